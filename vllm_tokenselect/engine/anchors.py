"""Which of an engine's layers are anchors, and where layers cannot share selections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.anchors import choose_anchors, give_roles
from vllm_tokenselect.method.settings import SettingsError


def settle_anchors(
    layers: Mapping[str, Any], stages: Sequence[Sequence[str]], config: TokenSelectConfig
) -> list[int]:
    """Give the layers of this process that select their roles.

    Args:
        layers: all of them by name, each with its `impl`.
        stages: the names of the layers that select in each pipeline stage, this process's among them.

    Returns:
        the numbers of the anchors of all stages, ascending.

    Raises:
        SettingsError: for a setting that names a layer which does not select.
    """
    numbers = [[_number(name) for name in stage] for stage in stages]
    selecting = sorted(number for stage in numbers for number in stage)
    firsts = [min(stage) for stage in numbers if stage]
    anchors = choose_anchors(config.anchor_layers, selecting, firsts)
    own = sorted(layers, key=_number)
    roles = give_roles(anchors, [_number(name) for name in own])
    for name, role in zip(own, roles, strict=True):
        layers[name].impl.take_role(role)
    return anchors


def refuse_to_share(
    layer_names: Sequence[str], vllm_config: Any, config: TokenSelectConfig
) -> None:
    """Check that the layers of a KV cache group are all that share selections.

    What was selected is named by KV slots, which mean other tokens in another group.

    Args:
        layer_names: the group's layers that select.

    Raises:
        SettingsError: for a model with several groups, and where a loader made the model without the
            function that `layer_backends` wraps.
    """
    if not config.method.shares_selections:
        return
    impls = _impls(vllm_config)
    if others := sorted(set(impls) - set(layer_names), key=_number):
        raise SettingsError(
            f"tokenselect anchor_layers={config.anchor_layers!r} cannot be used with this model: vLLM has "
            f"the KV cache of {others[0]} apart from that of {layer_names[0]}, so neither can attend to "
            'what the other selected. Set anchor_layers to "all".'
        )
    if not all(impls[name].took_role for name in layer_names):
        raise SettingsError(
            f"tokenselect anchor_layers={config.anchor_layers!r} cannot be used with this --load-format, "
            'which does not load models as vLLM\'s other loaders do. Use another one, or set it to "all".'
        )


def count_anchors(layer_names: Sequence[str], vllm_config: Any) -> int:
    """How many of the layers select for generated tokens."""
    impls = _impls(vllm_config)
    return sum(not (name in impls and impls[name].follows) for name in layer_names)


def _impls(vllm_config: Any) -> dict[str, Any]:
    """The implementations of this process's layers that select, by the layers' names."""
    context = vllm_config.compilation_config.static_forward_context
    impls = {name: getattr(layer, "impl", None) for name, layer in context.items()}
    return {name: impl for name, impl in impls.items() if hasattr(impl, "took_role")}


def _number(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))
