"""Attention on a GPU for rows of a few queries, as a decoding step has them: one launch.

A row's tokens lie scattered in the cache, and only the query heads that share a KV head can share the
reading of a token. So every query is attended by itself, and its tokens are cut into splits, each for a
program of its own. The last program of a query and KV head combines what all have left. Where splits begin
follows from a row's length alone: its result is the same bits whatever else is in the batch.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton

from vllm_tokenselect.device_memory import make_lasting
from vllm_tokenselect.kernels.attend.gpu_split import attend_split
from vllm_tokenselect.kernels.gpu_launch import INTERPRETED, SMALLEST_PRODUCT, is_fp8

SPLIT_TOKENS = 128  # splits are multiples of it
MAX_SPLITS = 32
# Keys and values of a step of a program at most. With two steps under way it leaves other programs room on
# a multiprocessor.
STEP_BYTES = 32 << 10
TOKENS_PER_STEP = 64
ROWS_PER_STEP = 512
# Elements of partial results that a program combines at once: 64 registers of a thread.
COMBINED_ELEMENTS = 8192
# Partial results of the queries of a launch; of one at least.
SCRATCH_BYTES = 64 << 20


class AttendScratch:
    """What the programs of a query leave for the last of them.

    Args:
        max_queries: most queries of a step; more than fit `SCRATCH_BYTES` take several launches.
        width: most tokens of a row.
        num_heads, num_kv_heads, head_size: of a layer.
        device: where it lies.

    Attributes:
        num_queries: most queries of a launch.
        weighted: fp32 [num_queries, splits, Hq, D], of each split the weighted sum of values.
        maxima, totals: fp32 [num_queries, splits, Hq], its highest score and its sum of weights.
        tickets: int32 [num_queries, Hkv], how many programs are done; zeros between launches.
    """

    def __init__(
        self,
        max_queries: int,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device,
    ) -> None:
        self.num_queries = queries_per_launch(max_queries, width, num_heads, head_size)
        parts = (self.num_queries, num_splits(width), num_heads)
        self.weighted = torch.empty((*parts, head_size), dtype=torch.float32, device=device)
        self.maxima, self.totals = torch.empty((2, *parts), dtype=torch.float32, device=device)
        shape = (self.num_queries, num_kv_heads)
        self.tickets = make_lasting(lambda: torch.zeros(shape, dtype=torch.int32, device=device))

    @property
    def num_bytes(self) -> int:
        parts = self.weighted.nbytes + self.maxima.nbytes + self.totals.nbytes
        return int(parts + self.tickets.nbytes)


def num_splits(width: int) -> int:
    """Most splits of a row of up to `width` tokens."""
    return max(min(-(-width // SPLIT_TOKENS), MAX_SPLITS), 1)


def queries_per_launch(max_queries: int, width: int, num_heads: int, head_size: int) -> int:
    """How many of a step's queries fit `SCRATCH_BYTES`; one does always."""
    query_bytes = 4 * num_splits(width) * num_heads * (head_size + 2)
    return max(min(SCRATCH_BYTES // query_bytes, max_queries), 1)


def attend_rows(
    query: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    scale: float,
    scratch: AttendScratch,
    out: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """As `reference.attend`, for tensors on a GPU; a row of one query that has no token gives zeros.

    Args:
        query: fp32, bf16 or fp16 [T, Hq, D], the last dimension contiguous.
        query_start_loc: as `reference.attend` takes it. Not read where rows have one query each: row `r`
            is then query `r`.
        max_query_len: most queries of a row. All of them read the row's tokens again.
        kv_cache: fp32, bf16, fp16, fp8 e4m3 or e5m2 [num_blocks, Hkv, 2, block_size, D] of any strides
            whose last is 1.
        max_length: most tokens of a row, no more than the scratch's width. It has no effect on results.
        scratch: overwritten.
        out: as `query`; queries of no row are left alone.
        key_scale, value_scale: fp32 [1] on the device, what a quantized cache is multiplied by.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    num_rows, is_single = len(lengths), max_query_len == 1
    num_queries = num_rows if is_single else len(query)
    group = num_heads // num_kv_heads
    lines = max(triton.next_power_of_2(group), SMALLEST_PRODUCT)
    padded_size = max(triton.next_power_of_2(head_size), 16)
    # fp8 is widened in registers, and rotated keys come with their partners and angles, in fp32 ones.
    element_bytes = max(kv_cache.dtype.itemsize, 2)
    if cos_sin is not None:
        element_bytes *= 4 if is_fp8(kv_cache.dtype) else 2
    token_bytes = 2 * padded_size * element_bytes
    tokens = min(max(STEP_BYTES // token_bytes, SMALLEST_PRODUCT), TOKENS_PER_STEP)
    num_warps = 8 if lines * padded_size > 4096 else 4
    members = triton.next_power_of_2(group)
    if num_splits(max_length) > scratch.weighted.shape[1]:
        raise ValueError(
            f"rows of {max_length} tokens have {num_splits(max_length)} splits, and the scratch holds "
            f"{scratch.weighted.shape[1]}"
        )
    combined = COMBINED_ELEMENTS * num_warps // 4 // (members * padded_size)
    for first in range(0, num_queries, scratch.num_queries):
        count = min(scratch.num_queries, num_queries - first)
        attend_split[(num_kv_heads, num_splits(max_length), count)](
            query,
            query_start_loc,
            kv_cache,
            slots,
            lengths,
            cos_sin,
            key_scale,
            value_scale,
            sinks,
            scratch.weighted,
            scratch.maxima,
            scratch.totals,
            scratch.tickets,
            out,
            scale,
            soft_cap,
            first,
            num_rows,
            query.stride(0),
            query.stride(1),
            slots.stride(0),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            kv_cache.stride(3),
            out.stride(0),
            out.stride(1),
            GROUP=group,
            LINES=lines,
            MEMBERS=members,
            HEAD_SIZE=head_size,
            PADDED_SIZE=padded_size,
            ROTATED=0 if cos_sin is None else cos_sin.shape[1],
            BLOCK_SIZE=block_size,
            TOKENS=tokens,
            SPLIT_TOKENS=SPLIT_TOKENS,
            MAX_SPLITS=MAX_SPLITS,
            COMBINED=min(max(combined, 1), MAX_SPLITS),
            ROWS=0 if is_single else ROWS_PER_STEP,
            # Triton's interpreter multiplies bf16 bits as if they were integers.
            WIDEN=INTERPRETED or torch.float32 in (query.dtype, kv_cache.dtype),
            QUANTIZED=is_fp8(kv_cache.dtype),
            HAS_SINKS=sinks is not None,
            CAPPED=soft_cap > 0,
            num_warps=num_warps,
            # Keys wait for slots: four stages ahead are two steps of keys and values. There is no room
            # for two of rotated keys, which come with their partners and angles.
            num_stages=5 if cos_sin is None else 3,
        )
