"""Which layers select for a generated token, and which attend to what another one has selected.

Consecutive layers look at much the same tokens. So a few layers, the *anchors*, may select for those above
them. The matrix that `tokenselect tune` draws says of a model how much is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_tokenselect.method.settings import AnchorLayers, SettingsError


class Role(NamedTuple):
    """What a layer does for a generated token.

    Attributes:
        follows: whether it attends to what the last anchor below it has selected.
        followers: of an anchor, how many layers do so with what it selects.
    """

    follows: bool = False
    followers: int = 0


def choose_anchors(
    setting: AnchorLayers, selecting: Sequence[int], first_of_stages: Collection[int] = ()
) -> list[int]:
    """The anchors among the layers that select, ascending.

    Args:
        setting: `Method.anchor_layers`.
        selecting: numbers of the model's layers that select, ascending; dense ones and those with a
            sliding window are not among them.
        first_of_stages: the first of them in each pipeline stage. They are anchors whatever the setting
            says, as the first one of all is: no anchor lies below them.

    Raises:
        SettingsError: for a layer that does not select.
    """
    if setting == "all":
        return list(selecting)
    if isinstance(setting, int):
        named = set(selecting[::setting])
    else:
        named = set(setting)
        if wrong := sorted(named - set(selecting)):
            raise SettingsError(
                f"tokenselect anchor_layers={list(setting)} names the layers {wrong}, which do not select. "
                f"The layers of this model that do are {list(selecting)}."
            )
    return sorted(named | set(first_of_stages) | set(selecting[:1]))


def give_roles(anchors: Collection[int], selecting: Sequence[int]) -> list[Role]:
    """The role of each of the layers of one pipeline stage that select.

    Args:
        anchors: as `choose_anchors` gives them; the first of `selecting` is one.
        selecting: numbers of the stage's layers, ascending.
    """
    firsts = [place for place, layer in enumerate(selecting) if layer in anchors]
    nexts = [*firsts[1:], len(selecting)]
    roles = []
    for first, following in zip(firsts, nexts, strict=True):
        followers = following - first - 1
        roles += [Role(follows=False, followers=followers)]
        roles += [Role(follows=True)] * followers
    return roles
