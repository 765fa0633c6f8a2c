"""One attention layer on TOKENSELECT, on a CPU."""

from __future__ import annotations

from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer

from vllm_tokenselect.backend.cpu_attention import CpuAttention
from vllm_tokenselect.backend.cpu_metadata import CpuTokenSelectMetadata
from vllm_tokenselect.backend.impl import TokenSelectImpl
from vllm_tokenselect.cpu.attention import GatheredAttention
from vllm_tokenselect.cpu.layer import CpuLayer
from vllm_tokenselect.cpu.warmup import compile_cpu_kernels
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.kernels.cpu_cache import is_temporary, kept_in
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.method.anchors import Role

logger = get_logger(__name__)


class CpuTokenSelectImpl(TokenSelectImpl[CpuTokenSelectMetadata]):
    """Writes keys and values into its own plain layout, selects, attends."""

    def prepare(self, vllm_config: VllmConfig) -> None:
        _compile_kernels(
            self.dtype,
            self.head_size,
            self.num_heads,
            self.num_kv_heads,
            vllm_config.cache_config.block_size,
            self.heads,
        )
        self.attends_with = (
            "kernels of its own for rows of one query, vLLM's CPU attention for rows of several"
        )
        method = self.config.method
        longest = method.max_attended
        if not method.reassigns_positions:
            # A request may ask for full attention: its rows are as long as its context. Memory that
            # no such request has touched is only reserved.
            longest = max(longest, vllm_config.model_config.max_model_len)
        self.attention = _shared_attention(self.num_kv_heads, self.head_size, self.dtype, longest)
        self.selections = self.selection_cache(vllm_config, torch.device("cpu"))
        self._kept: tuple[torch.Tensor, int, CpuLayer] | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write `key`, `value` [T, Hkv, D] to the slots int64 [T]."""
        self._layer(kv_cache).write_tokens(key, value, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CpuTokenSelectMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend `query` [T, Hq, D] to the cached tokens; writes and returns `output` [T, Hq, D]."""
        if attn_metadata is None:  # profiling run
            self.layer_rotation()
            return output.zero_()
        layer = self._layer(kv_cache)
        attn_metadata.step.run_kept_layer(query, layer, self.attention, output)
        return output

    def take_rotation(self, table: torch.Tensor | None) -> None:
        super().take_rotation(table)
        self._kept = None

    def take_role(self, role: Role) -> None:
        super().take_role(role)
        self._kept = None

    def _layer(self, kv_cache: torch.Tensor) -> CpuLayer:
        """The layer with this cache [num_blocks, Hkv, block_size, 2 * D], another one after a sleep.

        A block holds a head's keys, then its values.
        """
        if self._kept is not None:
            kept, address, layer = self._kept
            if kept is kv_cache and address == kv_cache.data_ptr():
                return layer
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        cache = LayerCache(
            pages=kv_cache.view(num_blocks, num_kv_heads, 2, block_size, self.head_size),
            selections=self.selections,
            follows=self.follows,
            followers=self.followers,
            rotation=self.layer_rotation(),
            sinks=self.sinks,
            soft_cap=self.logits_soft_cap,
        )
        layer = CpuLayer(cache, self.scale, self.dtype)
        self._kept = kv_cache, kv_cache.data_ptr(), layer
        return layer


@cache
def _shared_attention(
    num_kv_heads: int, head_size: int, dtype: torch.dtype, max_tokens: int
) -> GatheredAttention:
    """Layers run one after the other, so those of a shape share their buffers."""
    library = CpuAttention(num_kv_heads, head_size, dtype, max_tokens)
    return GatheredAttention(library, num_kv_heads, head_size, dtype, max_tokens)


@cache
def _compile_kernels(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    heads: HeadGroup | None,
) -> None:
    """Compile at start, not in the first request."""
    _say_where_kernels_are_kept()
    threads = compile_cpu_kernels(
        kv_dtype=dtype,
        head_size=head_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        heads=heads,
    )
    wanted = torch.get_num_threads()
    logger.info("TOKENSELECT: the CPU kernels run on %d of PyTorch's %d threads", threads, wanted)
    if threads < wanted:
        logger.warning(
            "TOKENSELECT is slower than it could be: numba has %d threads, PyTorch has %d. "
            "Set the environment variable NUMBA_NUM_THREADS=%d for the worker processes.",
            threads,
            wanted,
            wanted,
        )


def _say_where_kernels_are_kept() -> None:
    folder = kept_in()
    if folder is None:
        logger.warning(
            "TOKENSELECT compiles the CPU kernels at every start, which takes about 15 s: there is no "
            "folder to keep them in. Set the environment variable NUMBA_CACHE_DIR to one."
        )
    elif is_temporary(folder):
        logger.warning(
            "TOKENSELECT: compiling the CPU kernels (about 15 s once, then kept in the temporary folder "
            "%s: neither the package nor the user's cache can be written to)",
            folder,
        )
    else:
        logger.info(
            "TOKENSELECT: compiling the CPU kernels (about 15 s once, then kept in %s)", folder
        )
