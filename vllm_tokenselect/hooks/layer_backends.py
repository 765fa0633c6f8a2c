"""Say which layers run on which backend, and refuse a model that would not select as it should.

A model may bring a backend of its own for its layers, or have only layers that TOKENSELECT leaves on
vLLM's default (sliding windows). It would start, and select nothing. So when a model is made, before its
weights are loaded, the first layers are put on vLLM's default backend, as many as the setting
`dense_layers` says, and the layers of all pipeline stages are counted.

Wraps `initialize_model` wherever a loader has imported it, once a worker starts (`worker`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.anchors import settle_anchors
from vllm_tokenselect.engine.dense_layers import is_dense
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.refusals import refuse_model
from vllm_tokenselect.engine.step_size import check_hybrid_steps
from vllm_tokenselect.hooks import drafts
from vllm_tokenselect.hooks.dense_layers import leave_dense
from vllm_tokenselect.hooks.registration import BACKEND_NAME, backend_member, is_selected
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.hooks.start_log import describe_start, why_nothing_selects

SEAM = Seam(
    name="layer_backends",
    module="vllm.model_executor.model_loader.utils",
    qualname="initialize_model",
    parameters=("vllm_config",),
    contains=("model = model_class(vllm_config=vllm_config, prefix=prefix)", "return model"),
    why="leaves the first layers dense, and refuses models whose layers would not select",
    retired_by="vLLM calls plugins when a model is made, before its weights are loaded",
)


class Layer(NamedTuple):
    """A layer that caches something, and the backend that it runs on.

    Attributes:
        name: vLLM's name, with the layer's number in it.
        backend: the backend's name.
        kind: what kind of layer it is, in words; empty for a layer that selects.
        refused: whether the layer should select and would not.
    """

    name: str
    backend: str
    kind: str
    refused: bool = False


def settle_layers(
    model: nn.Module, vllm_config: Any, model_config: Any = None, prefix: str = ""
) -> None:
    """Put the layers of a model that was just made where they belong, then check and log them.

    Called with the arguments of `initialize_model`. That is called for draft models too, whose layers
    `drafts` checks, and for parts of a model, which are left alone.

    Raises:
        SettingsError: when no layer selects, or one should and would not, with the list of layers; or when
            a step has no room for what a hybrid model needs, with vLLM's option.
    """
    if drafts.is_draft(vllm_config, model_config):
        drafts.check_layers(model)
        return
    if prefix or (model_config is not None and model_config is not vllm_config.model_config):
        return
    if not is_selected(vllm_config.attention_config):
        return
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        leave_dense(model)
        stages = _of_all_stages(describe_layers(vllm_config))
        layers = [layer for stage in stages for layer in stage]
        listed = list_layers(layers)
        if any(layer.refused for layer in layers):
            refuse_model(f"layers that should select would not ({listed})")
        if not any(selects(layer) for layer in layers):
            refuse_model(
                f"no layer would select ({listed or 'it has no attention layer'}); TOKENSELECT is for "
                "layers that attend to the whole context"
            )
        check_hybrid_steps(vllm_config)
        names = [[layer.name for layer in stage if selects(layer)] for stage in stages]
        context = vllm_config.compilation_config.static_forward_context
        own = {name: context[name] for stage in names for name in stage if name in context}
        config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
        anchors = settle_anchors(own, names, config) if config.method.shares_selections else []
    logger = get_logger(__name__)
    impls = [layer.impl for layer in own.values()]
    said = describe_start(vllm_config, listed, sum(map(len, names)), len(layers), impls, anchors)
    logger.info_once("%s", said, scope="global")
    if reason := why_nothing_selects(vllm_config):
        logger.warning_once("%s", reason, scope="global")


def describe_layers(vllm_config: Any) -> list[Layer]:
    """Describe the layers that this process has made under an engine's configuration."""
    from vllm.config.vllm import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    return [_describe(name, layer, config) for name, layer in layers.items()]


def _describe(name: str, layer: Any, config: TokenSelectConfig) -> Layer:
    from vllm.model_executor.layers.attention import (
        Attention,
        ChunkedLocalAttention,
        RSWAAttention,
    )
    from vllm.v1.attention.backend import AttentionType

    backend = layer.get_attn_backend()
    own = backend_member().get_class()
    if backend is own:
        return Layer(name, BACKEND_NAME, "")
    if issubclass(backend, own):
        # The builder of such a backend gives TOKENSELECT other requests than the scheduler's, or other
        # masks.
        kind = "full attention, changed by the model"
        return Layer(name, backend.__name__, kind, refused=True)
    if backend.is_ssm():
        return Layer(name, backend.get_name(), "no key per token")
    if not isinstance(layer, Attention):
        kind = f"{type(layer).__name__}, a layer of the model's own"
        return Layer(name, backend.get_name(), kind, refused=True)
    if layer.attn_type != AttentionType.DECODER:
        return Layer(name, backend.get_name(), f"{layer.attn_type} attention")
    if isinstance(layer, ChunkedLocalAttention):
        return Layer(name, backend.get_name(), "chunked local attention")
    if layer.sliding_window is not None or isinstance(layer, RSWAAttention):
        return Layer(name, backend.get_name(), "sliding window")
    if is_dense(name, config):
        return Layer(name, backend.get_name(), f"dense_layers {config.dense_layers}")
    kind = "full attention, on a backend that the model brings"
    return Layer(name, backend.get_name(), kind, refused=True)


def selects(layer: Layer) -> bool:
    """Whether the layer runs on TOKENSELECT itself."""
    return layer.backend == BACKEND_NAME and not layer.kind


def _of_all_stages(layers: list[Layer]) -> list[list[Layer]]:
    """The layers of each pipeline stage; one stage alone may have no layer that selects."""
    import torch.distributed
    from vllm.distributed import get_pp_group

    group = get_pp_group()
    if group.world_size == 1:
        return [layers]
    stages: list[list[Layer]] = [[]] * group.world_size
    torch.distributed.all_gather_object(stages, layers, group=group.cpu_group)
    return stages


def list_layers(layers: Iterable[Layer]) -> str:
    """`layers 0-2, 4: CPU_ATTN (sliding window); layer 3: TOKENSELECT`."""
    return "; ".join(f"{names}: {runs_on}" for names, runs_on in group_layers(layers))


def group_layers(layers: Iterable[Layer]) -> list[tuple[str, str]]:
    """Layers with the same backend and kind, as text, and that backend and kind."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        runs_on = f"{layer.backend} ({layer.kind})" if layer.kind else layer.backend
        groups.setdefault(runs_on, []).append(layer.name)
    return [(_in_ranges(names), runs_on) for runs_on, names in groups.items()]


def _in_ranges(names: list[str]) -> str:
    """`layers 0-2, 5` of the layers' names; a name without a number is given as it is."""
    numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    indices = sorted({int(number[1]) for number in numbers if number})
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][-1] + 1:
            ranges[-1][1:] = [index]
        else:
            ranges.append([index])
    texts = ["-".join(map(str, part)) for part in ranges]
    texts += [name for name, number in zip(names, numbers, strict=True) if not number]
    return ("layer " if len(names) == 1 else "layers ") + ", ".join(texts)


def _initialize_and_settle(
    initialize_model: Any,
    vllm_config: Any,
    *,
    prefix: str = "",
    model_config: Any = None,
    **options: Any,
) -> nn.Module:
    vllm_config = drafts.config_of(vllm_config, model_config)
    model: nn.Module = initialize_model(
        vllm_config, prefix=prefix, model_config=model_config, **options
    )
    settle_layers(model, vllm_config, model_config, prefix)
    return model


def install() -> None:
    """Wrap vLLM's function wherever a loader has imported it; safe to call again."""
    SEAM.wrap(_initialize_and_settle)
