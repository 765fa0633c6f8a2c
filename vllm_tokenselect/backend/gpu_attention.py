"""The attention that a layer on a GPU is made with, of the library that was chosen for it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_tokenselect.engine.gpu_libraries import Library, flash_version, library_name
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention, SdpaAttention
from vllm_tokenselect.gpu.flash_attention import (
    GatheredFlashAttention,
    PagedFlashAttention,
    reads_in_place,
)
from vllm_tokenselect.gpu.plain_attention import PlainAttention


def pages_may_be_padded(vllm_config: VllmConfig, layer: Any) -> bool:
    """Whether vLLM pads the pages of a layer to those of another: `unify_kv_cache_spec_page_size`.

    Known once the model is loaded; vLLM decides later, when it has measured the memory that is left.

    Args:
        layer: vLLM's, of this engine.
    """
    own = layer.get_kv_cache_spec(vllm_config)
    layers = vllm_config.compilation_config.static_forward_context.values()
    specs = [
        each.get_kv_cache_spec(vllm_config)
        for each in layers
        if isinstance(each, AttentionLayerBase)
    ]
    largest = max(spec.page_size_bytes for spec in specs if spec is not None)
    return own.page_size_padded is not None or largest % own.page_size_bytes != 0


def make_attention(
    library: Library,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    quantized: bool,
    reassigned: bool,
    width: int,
    device: torch.device,
    padded: bool = False,
    has_sinks: bool = False,
    soft_cap: float = 0.0,
) -> RowAttention:
    """The library's attention; it may hold scratch, so layers of a shape should share one.

    Args:
        dtype: of the queries.
        quantized: whether the KV cache is.
        reassigned: whether positions are.
        width: most tokens of a row.
        padded: whether pages of the KV cache are larger than their tokens.
        has_sinks: whether layers come with sinks.
        soft_cap: of their logits; 0 for none.
    """
    version = flash_version(library, head_size)
    in_place = reads_in_place(version, as_cached=not (quantized or reassigned or padded))
    buffer = None if in_place else GatherBuffer(num_kv_heads, head_size, dtype, width, device)
    attention = _attention(library, version, buffer, has_sinks, soft_cap)
    get_logger(__name__).info(
        "TOKENSELECT attends with %s, %s%s%s: %d MiB of buffers, up to %d MiB of %s",
        "PyTorch's plain operations"
        if isinstance(attention, PlainAttention)
        else library_name(library, version),
        "through the sparse block table" if in_place else "over gathered tokens",
        ", positions reassigned" if reassigned else "",
        ", since pages of the KV cache are padded" if padded else "",
        attention.buffer_bytes >> 20,
        attention.scratch_bytes >> 20,
        "logits" if isinstance(attention, PlainAttention) else "partial outputs",
    )
    return attention


def _attention(
    library: Library,
    version: int | None,
    buffer: GatherBuffer | None,
    has_sinks: bool,
    soft_cap: float,
) -> RowAttention:
    """The library's attention, over gathered tokens where there is a buffer for them."""
    if version is not None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        if buffer is None:
            return PagedFlashAttention(flash_attn_varlen_func, soft_cap)
        return GatheredFlashAttention(flash_attn_varlen_func, version, buffer, soft_cap)
    assert buffer is not None  # only FlashAttention reads in place
    if library == "xformers":
        from vllm_tokenselect.gpu.xformers import XformersAttention

        return XformersAttention(buffer)
    if has_sinks or soft_cap:
        return PlainAttention(buffer, soft_cap)
    return SdpaAttention(buffer)
