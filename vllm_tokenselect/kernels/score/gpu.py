"""Scores on a GPU: a matrix product of a request's rows with tiles of its paged keys.

All rows of a request that are handed over together share the reading of its keys: 16 chunks of a
prefill step, or 64 queries of a prompt's tail, times the query heads of a KV head, fill the tensor
cores. A decoding row is padded to the smallest product that they take.

A mean query has more bits than the keys. Tensor cores multiply it in two parts, `q = high + low`, so that
a chunk selects what it would with its mean in fp32.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.columns import Columns
from vllm_tokenselect.kernels.gpu_launch import (
    INTERPRETED,
    LARGEST_PRODUCT,
    SMALLEST_PRODUCT,
    is_fp8,
    num_programs_wanted,
    warps_of_row,
)
from vllm_tokenselect.kernels.score.gpu_kernel import score_tile
from vllm_tokenselect.kernels.selection_cache.gpu_decide import Decision

# Parts of a row's candidates, of each of which the largest score and the sum are kept: what is added up
# in which order depends on the row alone.
NUM_PARTS = 64
SMALLEST_PART = 128  # tokens; longer rows have parts of twice as many, four times ...
TOKENS_PER_TILE = 64
# Of a program's queries and of a step's keys at most; more would not fit its shared memory.
QUERY_BYTES = 64 << 10
KEY_BYTES = 16 << 10
# What tensor cores multiply; fp8 is widened.
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Scores:
    """Buffers for the scores of rows, written by `score_paged_keys` and read by `soft_vote`.

    Attributes:
        logits: fp32 [Hq, C], contiguous; of every head the columns of all rows, counted from the first
            row's. C is a multiple of 16: for other numbers another kernel would be compiled, which might
            add up in another order. Undefined from a row's own end on. None where the vote computes the
            scores again, see `vote.gpu_rescoring`.
        columns: of the rows; row `r` has `max(ends[r] - start, 0)` candidates.
        maxima, sums: fp32 [R, Hq, NUM_PARTS], contiguous: largest score of each part of the candidates,
            and the sum of exp(score - largest) over it; -inf and 0 for an empty part.
        start: first candidate, the same for all rows.
        ends: int32 [R], end of the candidates (exclusive); `<= start` for a row without any.
    """

    logits: torch.Tensor | None
    columns: Columns
    maxima: torch.Tensor
    sums: torch.Tensor
    start: int
    ends: torch.Tensor


@dataclass(frozen=True)
class Product:
    """How queries are multiplied by keys.

    Attributes:
        dtype: of both; it holds every key exactly.
        parts: into which a query is split, of so many numbers each.
        padded_size: of a head.
        most_lines: query heads of rows that a program holds.
        tokens: whose keys are multiplied at once.
    """

    dtype: torch.dtype
    parts: int
    padded_size: int
    most_lines: int
    tokens: int

    @staticmethod
    def of(query: torch.Tensor, kv_cache: torch.Tensor) -> Product:
        dtype = _product_dtype(query.dtype, kv_cache.dtype)
        parts = 1 if dtype in (query.dtype, torch.float32) else 2
        padded_size = max(triton.next_power_of_2(query.shape[2]), 16)
        key_bytes = padded_size * dtype.itemsize
        return Product(
            dtype,
            parts,
            padded_size,
            most_lines=QUERY_BYTES // (key_bytes * parts),
            tokens=min(TOKENS_PER_TILE, KEY_BYTES // key_bytes),
        )


def tile_rows(num_heads: int, num_kv_heads: int) -> int:
    """Most rows of one request that share a tile."""
    group: int = triton.next_power_of_2(num_heads // num_kv_heads)
    return max(LARGEST_PRODUCT // group, 1)


def choose_programs(num_tiles: int, num_kv_heads: int, width: int) -> int:
    """Programs that share the parts of a tile, so that there is work for every multiprocessor."""
    wanted = triton.cdiv(num_programs_wanted(), max(num_tiles * num_kv_heads, 1))
    programs: int = min(wanted, NUM_PARTS, triton.cdiv(width, SMALLEST_PART))
    return max(programs, 1)


def score_paged_keys(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    rows_per_tile: int,
    scale: float,
    key_scale: torch.Tensor | None,
    scores: Scores,
    query_start: torch.Tensor | None = None,
    decision: Decision | None = None,
    programs: int | None = None,
) -> None:
    """As `reference.score_paged_keys`, into buffers of the caller.

    What is written of a row depends on no other row.

    Args:
        query: fp32, bf16 or fp16 [T, Hq, D], the last dimension contiguous.
        kv_cache: fp32, bf16, fp16, fp8 e4m3 or e5m2 [num_blocks, Hkv, 2, block_size, D] of any
            strides whose last is 1.
        tiles: int32 [tiles, 3], the request, first row and number of rows of each tile; rows of one
            tile follow each other. A tile without rows is left out.
        rows_per_tile: most rows of a tile; no more than `tile_rows`.
        key_scale: fp32 [1] that a quantized cache's keys are multiplied by, on the device.
        scores: written for the rows of tiles.
        query_start: int32 [R], the query that each row asks with; row `r` asks with query `r` when None.
        decision: decides for the row of each tile, which has no other, whether it reuses a selection;
            `scores.ends` is the decision's `scored_end`. All rows are decided already when None.
        programs: that share the parts of a tile; chosen when None. The result is the same.
    """
    if not len(tiles):
        return
    num_columns = 0 if scores.logits is None else scores.logits.shape[1]
    if num_columns % 16:
        raise ValueError(f"a head has {num_columns} scores, which is no multiple of 16")
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    product = Product.of(query, kv_cache)
    needed = max(triton.next_power_of_2(rows_per_tile * group), SMALLEST_PRODUCT)
    lines = min(needed, product.most_lines)
    splits = needed // lines  # of a tile, whose lines programs share
    many = lines > 64 or lines == product.most_lines
    if programs is None:
        programs = choose_programs(splits * len(tiles), num_kv_heads, scores.columns.widest)
    score_tile[(num_kv_heads, programs, splits * len(tiles))](
        query,
        query_start,
        kv_cache,
        block_table,
        tiles,
        scores.ends,
        scores.columns.starts,
        key_scale,
        scores.logits,
        scores.maxima,
        scores.sums,
        scale,
        scores.start,
        num_columns,
        num_heads,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(3),
        GROUP=group,
        HEAD_SIZE=head_size,
        PADDED_SIZE=product.padded_size,
        BLOCK_SIZE=block_size,
        LINES=lines,
        SPLITS=splits,
        TOKENS=product.tokens,
        SMALLEST_PART=SMALLEST_PART,
        PARTS=NUM_PARTS,
        PRODUCT=TRITON_DTYPES[product.dtype],
        PRODUCTS=product.parts,
        WIDEN=INTERPRETED,  # Triton's interpreter multiplies bf16 bits as if they were integers
        QUANTIZED=is_fp8(kv_cache.dtype),
        **({} if decision is None else decision.arguments),
        num_warps=8
        if rows_per_tile > 1 and many
        else warps_of_row(num_heads, num_kv_heads, head_size),
        # fp8 is widened in registers, and many lines fill them: no room for a third stage.
        num_stages=2 if is_fp8(kv_cache.dtype) or many else 3,
    )


def _product_dtype(query: torch.dtype, keys: torch.dtype) -> torch.dtype:
    """What queries and keys are multiplied in: it holds every key exactly."""
    if not is_fp8(keys):
        return keys
    return query if query == torch.float16 else torch.bfloat16
