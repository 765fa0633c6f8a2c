"""The attention that a layer on a GPU is made with, of the library that was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.gpu_libraries import Library, flash_version, library_name
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.replayed_steps import queries_per_request
from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention
from vllm_tokenselect.gpu.decoding_attention import FEW_QUERIES, DecodingAttention, make_scratch
from vllm_tokenselect.gpu.flash_attention import (
    GatheredFlashAttention,
    PagedFlashAttention,
    reads_in_place,
)
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.gpu.plain_attention import PlainAttention
from vllm_tokenselect.kernels.attend.gpu import AttendScratch
from vllm_tokenselect.kernels.head_group import HeadGroup


@dataclass(frozen=True)
class LayerShape:
    """What the buffers and the compiled kernels of a layer depend on.

    Attributes:
        limits: of the steps.
        library: that attends.
        dtype: of the queries.
        fp8_dtype: of the KV cache, if it is quantized.
        block_size: tokens of a block of the KV cache.
        heads: the ranks that vote together; None where a rank votes for itself.
        has_sinks: whether heads have sinks.
        soft_cap: of the logits; 0 for none.
        few_queries: most queries of a row that the own kernel attends; 0 where the library attends all.
    """

    limits: StepLimits
    library: Library
    head_size: int
    dtype: torch.dtype
    fp8_dtype: torch.dtype | None
    block_size: int
    device: torch.device
    heads: HeadGroup | None
    has_sinks: bool = False
    soft_cap: float = 0.0
    few_queries: int = 0


def few_queries(config: TokenSelectConfig, vllm_config: VllmConfig) -> int:
    """As `LayerShape.few_queries`: enough for every row of a decoding step, unless a library was chosen."""
    if config.attention != "auto":
        return 0
    return max(FEW_QUERIES, queries_per_request(vllm_config))


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


def describe_attention(shape: LayerShape) -> str:
    """What attends, in words."""
    name = _name(shape, flash_version(shape.library, shape.head_size))
    if not shape.few_queries:
        return name
    return f"a kernel of its own for rows of up to {shape.few_queries} queries, {name} for others"


def _name(shape: LayerShape, version: int | None) -> str:
    if shape.library == "sdpa" and (shape.has_sinks or shape.soft_cap):
        return "PyTorch's plain operations"
    return library_name(shape.library, version)


def make_attention(shape: LayerShape, padded: bool = False) -> RowAttention:
    """The attention of layers of a shape, which should share it: it may hold scratch.

    Args:
        padded: whether pages of the KV cache are larger than their tokens.
    """
    version = flash_version(shape.library, shape.head_size)
    limits, reassigned = shape.limits, shape.limits.method.reassigns_positions
    changed = shape.fp8_dtype is not None or reassigned or padded
    in_place, buffer = reads_in_place(version, as_cached=not changed), None
    if not in_place:
        buffer = GatherBuffer(
            limits.num_kv_heads, shape.head_size, shape.dtype, limits.table_width, shape.device
        )
    attention = _library(shape, version, buffer)
    get_logger(__name__).info(
        "TOKENSELECT attends with %s, %s%s%s: %d MiB of buffers, up to %d MiB of %s",
        _name(shape, version),
        "through the sparse block table" if in_place else "over gathered tokens",
        ", positions reassigned" if reassigned else "",
        ", since pages of the KV cache are padded" if padded else "",
        attention.buffer_bytes >> 20,
        attention.scratch_bytes >> 20,
        "logits" if isinstance(attention, PlainAttention) else "partial outputs",
    )
    if not shape.few_queries:
        return attention
    scratch = _scratch(shape)
    get_logger(__name__).info(
        "TOKENSELECT attends rows of up to %d queries, as in decoding, with its own kernel: "
        "%d MiB of partial outputs",
        shape.few_queries,
        scratch.num_bytes >> 20,
    )
    return DecodingAttention(attention, scratch, shape.few_queries, shape.soft_cap)


@cache
def _scratch(shape: LayerShape) -> AttendScratch:
    return make_scratch(shape.limits, shape.head_size, shape.device)


def _library(shape: LayerShape, version: int | None, buffer: GatherBuffer | None) -> RowAttention:
    """The library's attention, over gathered tokens where there is a buffer for them."""
    if version is not None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        if buffer is None:
            return PagedFlashAttention(flash_attn_varlen_func, shape.soft_cap)
        return GatheredFlashAttention(flash_attn_varlen_func, version, buffer, shape.soft_cap)
    assert buffer is not None  # only FlashAttention reads in place
    if shape.library == "xformers":
        from vllm_tokenselect.gpu.xformers import XformersAttention

        return XformersAttention(buffer)
    if shape.has_sinks or shape.soft_cap:
        return PlainAttention(buffer, shape.soft_cap)
    return SdpaAttention(buffer)
