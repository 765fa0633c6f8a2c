"""How much of a layer's attention the selection of a layer below it keeps.

The model attends in full and is only watched. Of each layer the positions are kept that its selection
would attend to for some single tokens, and of each layer above the attention is summed over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.inspect.selections import (
    Chunk,
    attended_positions,
    by_votes,
    causal_scores,
)

Float64 = npt.NDArray[np.float64]


class SharedMass:
    """Attention that changes nothing and measures, layer by layer, over any number of sequences.

    Args:
        method: the settings, with native positions.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._singles: list[Chunk] = []
        self._attended: dict[int, torch.Tensor] = {}  # by layer, int64 [n, m]
        self._kept: dict[tuple[int, int], list[torch.Tensor]] = {}  # by layers i and j, fp32 [n]

    def measure(self, singles: Sequence[Chunk]) -> None:
        """Measure these single tokens, which select, in the forward that comes next."""
        self._singles = list(singles)
        self._attended = {}

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> None:
        if layer < self._method.dense_layers or not self._singles:
            return
        positions = torch.tensor([chunk.start for chunk in self._singles], device=key.device)
        asking = query[:, positions - (key.shape[1] - query.shape[1])].float()  # [Hq, n, D]
        selected = by_votes(self._singles, asking, key, scale)
        self._attended[layer] = torch.stack(
            [
                attended_positions(chunk, chosen, self._method)
                for chunk, chosen in zip(self._singles, selected, strict=True)
            ]
        )
        shares = causal_scores(asking, positions, key, scale).softmax(dim=-1).mean(dim=0)  # [n, T]
        for below, attended in self._attended.items():
            self._kept.setdefault((below, layer), []).append(
                shares.gather(1, attended).sum(1).cpu()
            )

    @property
    def layers(self) -> list[int]:
        """The layers that select, ascending."""
        return sorted({layer for _, layer in self._kept})

    def matrix(self) -> Float64:
        """Share of attention, 0 to 1, that the selection in layer i keeps in layer j: [layers, layers].

        The mean over tokens and heads. 0 where j lies below i.
        """
        return self._over_tokens(lambda kept: float(kept.mean()))

    def worst(self) -> Float64:
        """The same for the tenth of the tokens that lose most: what nine of ten tokens keep at least.

        A token that finds something far back needs its layers' own selections, and there are few of them.
        """
        return self._over_tokens(lambda kept: float(kept.quantile(0.1)))

    def _over_tokens(self, measure: Callable[[torch.Tensor], float]) -> Float64:
        layers = self.layers
        found = np.zeros((len(layers), len(layers)))
        for (below, layer), parts in self._kept.items():
            found[layers.index(below), layers.index(layer)] = measure(torch.cat(parts))
        return found


def propose_anchors(kept: Float64, count: int) -> tuple[int, ...]:
    """The `count` anchors that keep the most attention, summed over all layers.

    A layer's selection is that of the last anchor at or below it. The first layer is an anchor. Found by
    going down from the last layer: what the layers from i on keep, if i is the first of k anchors there,
    is what i keeps up to the next anchor and the most that k - 1 anchors keep from there on.

    Args:
        kept: as `SharedMass.matrix` gives it, [layers, layers].
        count: 1 to the number of layers.

    Returns:
        indices of rows, ascending.
    """
    layers = len(kept)
    up_to = np.triu(kept).cumsum(axis=1)  # [i, j]: what i keeps in the layers i to j
    most = up_to[:, -1]
    following: list[npt.NDArray[np.int64]] = []
    for _ in range(count - 1):
        # [i, e]: with the next anchor at e
        split = np.full((layers, layers), -np.inf)
        for first in range(layers - 1):
            split[first, first + 1 :] = up_to[first, first:-1] + most[first + 1 :]
        following.append(split.argmax(axis=1))
        most = split.max(axis=1)
    anchors = [0]
    for choice in reversed(following):
        anchors.append(int(choice[anchors[-1]]))
    return tuple(anchors)


def kept_by(kept: Float64, anchors: Sequence[int]) -> float:
    """Share of attention, mean over layers, that the last anchor at or below each of them keeps."""
    owners = [max(a for a in anchors if a <= layer) for layer in range(len(kept))]
    return float(np.mean([kept[owner, layer] for layer, owner in enumerate(owners)]))
