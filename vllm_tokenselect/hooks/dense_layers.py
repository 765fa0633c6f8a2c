"""Leave the first layers on vLLM's own attention backend, which attends to everything.

vLLM chooses the backend of a layer by its kind, not by its number, so all full-attention layers of a model
are made on TOKENSELECT. When they are made, before their weights are loaded, `layer_backends` has the first
ones, as many as the setting `dense_layers` says, put on the platform's default backend here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.dense_layers import is_dense, refuse_to_part
from vllm_tokenselect.hooks.platform_backend import default_backend
from vllm_tokenselect.hooks.registration import BACKEND_NAME


def leave_dense(model: nn.Module) -> None:
    """Put the model's first layers on the platform's default backend, as many as the settings say.

    Called once the model is made, under its engine's configuration.
    """
    from vllm.config import get_current_vllm_config

    vllm_config = get_current_vllm_config()
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    layers = dict(_selecting_layers(model))
    refuse_to_part(layers, config)
    for name, layer in layers.items():
        if is_dense(name, config):
            _put_on_default_backend(layer)


def _selecting_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from vllm.model_executor.layers.attention import Attention

    for module in model.modules():
        if isinstance(module, Attention) and module.attn_backend.get_name() == BACKEND_NAME:
            yield module.layer_name, module


def _put_on_default_backend(layer: Any) -> None:
    """What `Attention.__init__` does with a backend, with the platform's default one.

    TOKENSELECT has refused layers with any of the options that are left out here. Not every backend
    has the argument `sinks`; those of layers with sinks do.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = default_backend(
        layer.head_size,
        layer.dtype,
        layer.kv_cache_dtype,
        attn_type=layer.attn_type,
        has_sink=layer.has_sink,
    )
    old = layer.impl
    extra = {} if old.sinks is None else {"sinks": old.sinks}
    layer.attn_backend = backend
    layer.backend = AttentionBackendEnum[backend.get_name()]
    layer.impl = backend.get_impl_cls()(
        *(old.num_heads, old.head_size, old.scale, old.num_kv_heads),
        *(None, None, layer.kv_cache_dtype, old.logits_soft_cap or None, layer.attn_type),
        layer.kv_sharing_target_layer_name,
        **extra,
    )
