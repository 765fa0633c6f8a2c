"""One attention layer on TOKENSELECT, on a GPU."""

from __future__ import annotations

from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

from vllm_tokenselect.backend.gpu_attention import Library, choose_library, make_attention
from vllm_tokenselect.backend.gpu_metadata import GpuTokenSelectMetadata, step_limits
from vllm_tokenselect.backend.impl import TokenSelectImpl
from vllm_tokenselect.counters import worker_counters
from vllm_tokenselect.gpu.attention import LayerCache, RowAttention
from vllm_tokenselect.gpu.rows import StepLimits
from vllm_tokenselect.gpu.warmup import compile_gpu_kernels
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.hooks.log import get_logger
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

logger = get_logger(__name__)

# How vLLM's names of quantised caches are to be read; it hands them over as bytes.
FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class GpuTokenSelectImpl(TokenSelectImpl[GpuTokenSelectMetadata]):
    """Writes with vLLM's kernel, selects with Triton's, attends with a library."""

    def prepare(self, vllm_config: VllmConfig) -> None:
        """Allocate what the layers share, before vLLM measures the memory that is left."""
        device = torch.device("cuda", torch.cuda.current_device())
        self.fp8_dtype = FP8_DTYPES.get(self.kv_cache_dtype)
        self.selections = self.selection_cache(vllm_config, device)
        self.workspace, self.attention = _shared(
            step_limits(vllm_config, self.num_heads, self.num_kv_heads),
            choose_library(self.config.attention, self.head_size, self.dtype),
            self.head_size,
            self.dtype,
            self.fp8_dtype,
            vllm_config.cache_config.block_size,
            device,
        )

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
        if attn_metadata is None:  # profiling run
            return output.zero_()
        attn_metadata.step.run_layer(
            query, self._cache(layer, kv_cache), self.scale, self.workspace, self.attention, output
        )
        return output

    def _cache(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> LayerCache:
        """vLLM's [num_blocks, Hkv, block_size, 2 D], of any strides, as the kernels read it."""
        keys_and_values = kv_cache.unfold(-1, self.head_size, self.head_size)
        pages = keys_and_values.movedim(3, 2)
        if self.fp8_dtype is None:
            return LayerCache(pages, selections=self.selections)
        return LayerCache(
            pages.view(self.fp8_dtype), layer._k_scale, layer._v_scale, self.selections
        )


@cache
def _shared(
    limits: StepLimits,
    library: Library,
    head_size: int,
    dtype: torch.dtype,
    fp8_dtype: torch.dtype | None,
    block_size: int,
    device: torch.device,
) -> tuple[Workspace, RowAttention]:
    """Layers run one after the other, so those of a shape share their buffers.

    Also compiles their kernels: at start, not in the first request.
    """
    workspace = Workspace(limits, head_size, device, worker_counters(device))
    logger.info(
        "TOKENSELECT: %d MiB of workspace, scores of %d queries at a time over %d tokens, "
        "top-k by the own radix selection",
        workspace.num_bytes >> 20,
        limits.rows_that_fit(limits.max_width),
        limits.max_model_len,
    )
    attention = make_attention(
        library,
        limits.num_kv_heads,
        head_size,
        dtype,
        fp8_dtype is not None,
        limits.table_width,
        device,
    )
    block = torch.zeros(
        (1, block_size, limits.num_kv_heads, 2, head_size), dtype=dtype, device=device
    )
    scale = None if fp8_dtype is None else torch.ones((), device=device)
    selections = None
    if limits.method.reuses_selections:
        selections = SelectionCacheState.allocate(
            1, limits.method.selection_size, limits.num_heads, head_size, dtype, device
        )
    pages = block.to(fp8_dtype or dtype).permute(0, 2, 3, 1, 4)
    cache = LayerCache(pages, scale, scale, selections)
    logger.info("TOKENSELECT: compiling the Triton kernels")
    compile_gpu_kernels(workspace, attention, cache, -(-limits.max_model_len // block_size), dtype)
    return workspace, attention
