"""FlashAttention over the sparse block table.

vLLM builds its own FlashAttention; whoever makes these classes hands its function over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_tokenselect.device_memory import make_lasting
from vllm_tokenselect.gpu.attention import (
    PAGE_TOKENS,
    GatherBuffer,
    GatheredRows,
    GatheringAttention,
)
from vllm_tokenselect.gpu.flash_varlen import VarlenFunction, attend_with_sinks
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.layer_cache import LayerCache

# FlashAttention splits a row's tokens into parts, to have work for every multiprocessor. This is the most
# that it allocates for their partial outputs.
SPLIT_BYTES = 64 << 20
MAX_SPLITS = 32  # as many as vLLM allows in a CUDA graph


def reads_in_place(version: int | None, as_cached: bool) -> bool:
    """Whether this version of FlashAttention reads the cache through the sparse block table.

    Args:
        as_cached: whether keys are attended as they are cached, neither widened nor rotated.
    """
    return version == 3 and as_cached


def choose_splits(version: int, query: torch.Tensor, most_queries: int) -> int:
    """Most parts that a row's tokens may be split into; 0 leaves the choice to FlashAttention.

    Partial outputs are allocated for all queries that are handed over. FlashAttention 3 chooses as many
    parts as one row alone could use; version 4 no more than its rows need to fill the multiprocessors,
    which is bounded unless it is handed queries of other rows too. Version 2 allocates for rows.

    Args:
        query: [T, Hq, D].
        most_queries: of the rows.
    """
    num_queries, num_heads, head_size = query.shape
    if version == 2 or (version == 4 and num_queries <= most_queries):
        return 0
    if version == 4:
        return 1
    part_bytes = 4 * num_queries * num_heads * (head_size + 1)  # fp32, and the logarithm of its sum
    return min(max(SPLIT_BYTES // part_bytes, 1), MAX_SPLITS)


class PagedFlashAttention:
    """FlashAttention 3, which takes pages of a single token: reads the cache where it lies.

    Args:
        varlen: `flash_attn_varlen_func` of vLLM's `vllm_flash_attn`.
        soft_cap: of the logits; 0 for none.
    """

    name = "flash"
    in_place = True
    buffer_bytes = 0
    scratch_bytes = SPLIT_BYTES

    def __init__(self, varlen: VarlenFunction, soft_cap: float = 0.0) -> None:
        self.varlen = varlen
        self.soft_cap = soft_cap

    def takes(self, pages: torch.Tensor) -> bool:
        return lies_evenly(pages)

    def parts(self, group: RowGroup) -> Sequence[RowGroup]:
        return (group,)

    def rotates(self, group: RowGroup) -> bool:
        return False

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        table: SparseBlockTable,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        keys, values = single_token_pages(cache.pages)
        attend_with_sinks(
            self.varlen,
            3,
            cache.sinks,
            out,
            group.query_start_loc,
            q=query,
            k=keys,
            v=values,
            max_seqlen_q=group.max_query_len,
            seqused_k=table.lengths,
            max_seqlen_k=group.max_length,
            block_table=table.slots,
            softmax_scale=scale,
            softcap=self.soft_cap,
            num_splits=choose_splits(3, query, len(query)),
        )


class GatheredFlashAttention(GatheringAttention):
    """FlashAttention of any version over gathered tokens.

    For GPUs before Hopper, and where keys must be widened or rotated first.

    Args:
        varlen: `flash_attn_varlen_func` of vLLM's `vllm_flash_attn`.
        version: of FlashAttention.
        buffer: scratch, shared by layers.
        soft_cap: of the logits; 0 for none.
    """

    name = "flash"
    scratch_bytes = SPLIT_BYTES
    zeroed = PAGE_TOKENS  # versions 3 and 4 copy whole pages, and multiply all of one with weights

    def __init__(
        self, varlen: VarlenFunction, version: int, buffer: GatherBuffer, soft_cap: float = 0.0
    ) -> None:
        super().__init__(buffer)
        self.varlen = varlen
        self.version = version
        self.soft_cap = soft_cap
        # The buffer as a paged cache, so that lengths may lie on the device.
        self.keys = buffer.keys.unflatten(1, (-1, PAGE_TOKENS)).flatten(0, 1)
        self.values = buffer.values.unflatten(1, (-1, PAGE_TOKENS)).flatten(0, 1)
        pages = make_lasting(
            lambda: torch.arange(len(self.keys), dtype=torch.int32, device=self.keys.device)
        )
        self.block_table = pages.view(buffer.num_lines, -1)

    def attend(
        self,
        query: torch.Tensor,
        sinks: torch.Tensor | None,
        group: RowGroup,
        rows: GatheredRows,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        num_rows = rows.last - rows.first
        queries, starts = _queries_of(group, rows.first, rows.last)
        own = query[queries]
        attend_with_sinks(
            self.varlen,
            self.version,
            sinks,
            out[queries],
            starts,
            q=own,
            k=self.keys,
            v=self.values,
            max_seqlen_q=group.max_query_len,
            seqused_k=rows.lengths,
            max_seqlen_k=rows.keys.shape[1],
            block_table=self.block_table[:num_rows],
            softmax_scale=scale,
            softcap=self.soft_cap,
            num_splits=choose_splits(self.version, own, num_rows * group.max_query_len),
        )


def _queries_of(group: RowGroup, first: int, last: int) -> tuple[slice, torch.Tensor]:
    """Queries of the rows [first, last) of a group, and where each row's start among them.

    Where each row has one query, FlashAttention 2 takes as many queries as rows. Longer rows of a captured
    step start where only the device knows: they are handed all queries of the group.
    """
    starts = group.query_start_loc[first : last + 1]
    if group.max_query_len > 1 or (first == 0 and last == group.num_rows):
        return slice(None), starts
    # A padded row, without queries, starts behind the last query of the group.
    return slice(first, last), (starts - first).clamp_(min=0) if first else starts


def lies_evenly(pages: torch.Tensor) -> bool:
    """Whether the tokens of all blocks [num_blocks, Hkv, 2, block_size, D] lie at equal distances.

    They do not where a page is padded to the size of another layer's, or keeps each head's tokens together.
    """
    block, _, _, token, element = pages.stride()
    return block == pages.shape[3] * token and element == 1


def single_token_pages(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [num_slots, 1, Hkv, D] of a cache [num_blocks, Hkv, 2, block_size, D].

    Raises:
        ValueError: when the tokens of all blocks do not lie at equal distances.
    """
    num_blocks, num_kv_heads, _, block_size, head_size = pages.shape
    block, head, kind, token, _ = pages.stride()
    if not lies_evenly(pages):
        raise ValueError(
            f"a KV cache with strides {pages.stride()} cannot be read token by token: its blocks are "
            f"{block} elements apart, its tokens {token}"
        )
    shape = (num_blocks * block_size, 1, num_kv_heads, head_size)
    strides = (token, token, head, 1)
    keys = pages.as_strided(shape, strides)
    values = pages.as_strided(shape, strides, pages.storage_offset() + kind)
    return keys, values
