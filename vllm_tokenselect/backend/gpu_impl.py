"""One attention layer on TOKENSELECT, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

from vllm_tokenselect.backend.gpu_attention import (
    LayerShape,
    describe_attention,
    few_queries,
    make_attention,
    pages_may_be_padded,
)
from vllm_tokenselect.backend.gpu_metadata import GpuTokenSelectMetadata
from vllm_tokenselect.backend.impl import TokenSelectImpl
from vllm_tokenselect.counters import worker_counters
from vllm_tokenselect.engine.gpu_libraries import choose_library
from vllm_tokenselect.engine.graph_sizes import step_limits
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.gpu.attention import FP8_DTYPES, RowAttention
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.warmup import compile_gpu_kernels
from vllm_tokenselect.gpu.workspace import KeptLines, Workspace
from vllm_tokenselect.kernels.head_group import num_voting_heads
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

logger = get_logger(__name__)


class GpuTokenSelectImpl(TokenSelectImpl[GpuTokenSelectMetadata]):
    """Writes with vLLM's kernel, selects with Triton's, attends with one or a library."""

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Allocate what the layers share, before vLLM measures the memory that is left."""
        device = torch.device("cuda", torch.cuda.current_device())
        self.fp8_dtype = FP8_DTYPES.get(self.kv_cache_dtype)
        self.selections = self.selection_cache(vllm_config, device)
        has_sinks = self.sinks is not None
        library = choose_library(
            self.config.attention,
            self.head_size,
            self.dtype,
            has_sinks=has_sinks,
            soft_cap=self.logits_soft_cap,
        )
        self.shape = LayerShape(
            limits=step_limits(vllm_config, self.num_heads, self.num_kv_heads),
            library=library,
            head_size=self.head_size,
            dtype=self.dtype,
            fp8_dtype=self.fp8_dtype,
            block_size=vllm_config.cache_config.block_size,
            device=device,
            heads=self.heads,
            has_sinks=has_sinks,
            soft_cap=self.logits_soft_cap,
            few_queries=few_queries(self.config, vllm_config),
        )
        self.vllm_config = vllm_config
        self.attends_with = describe_attention(self.shape)
        self.workspace, self.attention = _shared(self.shape)
        if not self.reassigns_positions:
            _compile(self.shape, None)

    def take_rotation(self, table: torch.Tensor | None) -> None:
        super().take_rotation(table)
        # Not earlier: how many elements of a head are rotated is compiled in.
        _compile(self.shape, None if table is None else table.shape[1])

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write `key`, `value` [T, Hkv, D] to the slots int64 [T]."""
        keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        reshape_and_cache_flash(
            key,
            value,
            keys,
            values,
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: GpuTokenSelectMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend `query` [T, Hq, D] to the cached tokens; writes and returns `output` [T, Hq, D]."""
        rotation = self.layer_rotation()
        if attn_metadata is None:
            self._reserve(layer, output.device)
            return output.zero_()
        cache = self._cache(layer, kv_cache, rotation)
        if not self.attention.takes(cache.pages):
            self.attention = _gathering(self.shape)
        attn_metadata.step.run_layer(
            query, cache, self.scale, self.workspace, self.attention, output
        )
        return output

    def _reserve(self, layer: AttentionLayer, device: torch.device) -> None:
        """Let a profiling run see the memory that steps will take."""
        # For a moment, in every layer in turn.
        torch.empty(self.attention.scratch_bytes, dtype=torch.uint8, device=device)
        if self.attention.in_place and pages_may_be_padded(self.vllm_config, layer):
            _gathering(self.shape)

    def _cache(
        self, layer: AttentionLayer, kv_cache: torch.Tensor, rotation: Rotation | None
    ) -> LayerCache:
        """vLLM's [num_blocks, Hkv, block_size, 2 D], of any strides, as the kernels read it."""
        pages = kv_cache.unfold(-1, self.head_size, self.head_size).movedim(3, 2)
        key_scale, value_scale = None, None
        if self.fp8_dtype is not None:
            writer = self.writer or layer  # a layer that shares a cache may come without scales
            pages = pages.view(self.fp8_dtype)
            key_scale, value_scale = writer._k_scale, writer._v_scale
        return LayerCache(
            pages=pages,
            key_scale=key_scale,
            value_scale=value_scale,
            selections=self.selections,
            follows=self.follows,
            followers=self.followers,
            rotation=rotation,
            sinks=self.sinks,
        )


@cache
def _shared(shape: LayerShape) -> tuple[Workspace, RowAttention]:
    """Layers run one after the other, so those of a shape share their buffers."""
    limits = shape.limits
    workspace = Workspace(
        limits,
        shape.head_size,
        shape.device,
        counters=worker_counters(shape.device),
        dtype=shape.dtype,
        heads=shape.heads,
        kept=_kept_lines(_of_any_heads(limits), shape.device),
    )
    shared = f", {workspace.kept.num_bytes >> 20} of them for selections that layers share"
    logger.info(
        "TOKENSELECT: %d MiB of workspace%s, scores of %d candidates at a time, "
        "top-k by the own radix selection",
        workspace.num_bytes >> 20,
        shared if limits.kept_rows else "",
        limits.score_columns,
    )
    return workspace, make_attention(shape)


@cache
def _kept_lines(limits: StepLimits, device: torch.device) -> KeptLines:
    """An anchor and its followers may have other shapes, and share these all the same."""
    return KeptLines(limits, device)


def _of_any_heads(limits: StepLimits) -> StepLimits:
    return replace(limits, num_heads=1, num_kv_heads=1)


@cache
def _gathering(shape: LayerShape) -> RowAttention:
    """Attention for layers whose pages are padded, which is not read in place."""
    attention = make_attention(shape, padded=True)
    _compile_with(attention, shape, None)
    return attention


@cache
def _compile(shape: LayerShape, rotated: int | None) -> None:
    """Compile the kernels of such layers: at start, not in the first request.

    Args:
        rotated: elements of a head that the layer rotates; None if it rotates nothing.
    """
    _compile_with(_shared(shape)[1], shape, rotated)


def _compile_with(attention: RowAttention, shape: LayerShape, rotated: int | None) -> None:
    logger.info("TOKENSELECT: compiling the Triton kernels")
    block_table_width = -(-shape.limits.max_model_len // shape.block_size)
    cache = _cache_of_one_block(shape, rotated)
    compile_gpu_kernels(_shared(shape)[0], attention, cache, block_table_width, shape.dtype)


def _cache_of_one_block(shape: LayerShape, rotated: int | None) -> LayerCache:
    """The cache of a layer as steps will hand it over, but for its size; `rotated` as in `_compile`."""
    limits, device = shape.limits, shape.device
    block = torch.zeros(
        (1, shape.block_size, limits.num_kv_heads, 2, shape.head_size),
        dtype=shape.dtype,
        device=device,
    )
    scale, selections, rotation, sinks = None, None, None, None
    if shape.fp8_dtype is not None:
        # As vLLM's scales, whatever default dtype the model is built with.
        scale = torch.ones((), dtype=torch.float32, device=device)
    if limits.method.reuses_selections:
        selections = SelectionCacheState.allocate(
            capacity=1,
            selection_size=limits.method.selection_size,
            num_heads=num_voting_heads(limits.num_heads, shape.heads),
            head_size=shape.head_size,
            dtype=shape.dtype,
            device=device,
        )
    if rotated is not None:
        table = torch.zeros((limits.table_width, rotated), dtype=torch.float32, device=device)
        rotation = Rotation(table, table[0])
    if shape.has_sinks:
        sinks = torch.zeros(limits.num_heads, dtype=shape.dtype, device=device)
    return LayerCache(
        pages=block.to(shape.fp8_dtype or shape.dtype).permute(0, 2, 3, 1, 4),
        key_scale=scale,
        value_scale=scale,
        selections=selections,
        rotation=rotation,
        sinks=sinks,
    )
