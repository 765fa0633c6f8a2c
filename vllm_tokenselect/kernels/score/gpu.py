"""Scores on a GPU: a matrix product of a request's rows with tiles of its paged keys.

All rows of a request that are handed over together share the reading of its keys: 16 chunks of a
prefill step, or 64 queries of a prompt's tail, times the query heads of a KV head, fill the tensor
cores. A decoding row is padded to the smallest product that they take.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import (
    INTERPRETED,
    LARGEST_PRODUCT,
    SMALLEST_PRODUCT,
    is_fp8,
    num_programs_wanted,
)

# Parts of a tile's candidates, of each of which the largest score and the sum are kept. Always as many, so
# that what is added up in which order depends on the tile alone.
NUM_PARTS = 64
TOKENS_PER_TILE = 64
# Of a program's queries and of a step's keys at most; more would not fit its shared memory.
QUERY_BYTES = 64 << 10
KEY_BYTES = 32 << 10


@dataclass(frozen=True)
class Scores:
    """Buffers for the scores of rows, written by `score_paged_keys` and read by `soft_vote`.

    Attributes:
        logits: fp32 [R, Hq, N], contiguous, N at least max(ends) - start; undefined from a row's own end
            on.
        maxima, sums: fp32 [R, Hq, NUM_PARTS], contiguous: largest score of each part of the candidates,
            and the sum of exp(score - largest) over it; -inf and 0 for an empty part.
        start: first candidate, the same for all rows.
        ends: int32 [R], end of the candidates (exclusive); `<= start` for a row without any.
    """

    logits: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
    start: int
    ends: torch.Tensor


def tile_rows(num_heads: int, num_kv_heads: int) -> int:
    """Most rows of one request that share a tile."""
    return max(LARGEST_PRODUCT // (num_heads // num_kv_heads), 1)


def choose_programs(num_tiles: int, num_kv_heads: int, width: int) -> int:
    """Programs that share the parts of a tile, so that there is work for every multiprocessor."""
    wanted = triton.cdiv(num_programs_wanted(), max(num_tiles * num_kv_heads, 1))
    programs: int = min(wanted, NUM_PARTS, triton.cdiv(width, TOKENS_PER_TILE))
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
    programs: int | None = None,
) -> None:
    """As `reference.score_paged_keys`, into buffers of the caller.

    Args:
        query: fp32 [R, Hq, D], contiguous.
        kv_cache: fp32, bf16, fp16, fp8 e4m3 or e5m2 [num_blocks, Hkv, 2, block_size, D] of any
            strides whose last is 1.
        tiles: int32 [tiles, 3], the request, first row and number of rows of each tile; rows of one
            tile follow each other. A tile without rows is left out.
        rows_per_tile: most rows of a tile; no more than `tile_rows`.
        key_scale: fp32 [1] that a quantized cache's keys are multiplied by, on the device.
        scores: written for the rows of tiles.
        programs: that share the parts of a tile; chosen when None. The result is the same.
    """
    if not len(tiles):
        return
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    if programs is None:
        programs = choose_programs(len(tiles), num_kv_heads, scores.logits.shape[2])
    padded_size = max(triton.next_power_of_2(head_size), 16)
    line_bytes = padded_size * (4 if kv_cache.dtype == torch.float32 else 2)  # fp8 is widened
    needed = max(triton.next_power_of_2(rows_per_tile * group), SMALLEST_PRODUCT)
    lines = min(needed, QUERY_BYTES // line_bytes)
    splits = needed // lines  # of a tile, whose lines programs share
    many = lines > 64 or lines * line_bytes == QUERY_BYTES
    _score[(num_kv_heads, programs, splits * len(tiles))](
        query,
        kv_cache,
        block_table,
        tiles,
        scores.ends,
        key_scale,
        scores.logits,
        scores.maxima,
        scores.sums,
        scale,
        scores.start,
        scores.logits.shape[2],
        num_heads,
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(3),
        GROUP=group,
        HEAD_SIZE=head_size,
        PADDED_SIZE=padded_size,
        BLOCK_SIZE=block_size,
        LINES=lines,
        SPLITS=splits,
        TOKENS=min(TOKENS_PER_TILE, KEY_BYTES // line_bytes),
        PARTS=NUM_PARTS,
        # Triton's interpreter multiplies bf16 bits as if they were integers.
        WIDEN=INTERPRETED or kv_cache.dtype == torch.float32,
        QUANTIZED=is_fp8(kv_cache.dtype),
        num_warps=8 if many or padded_size > 256 else 4,
        # fp8 is widened in registers, and many lines fill them: no room for a third stage.
        num_stages=2 if is_fp8(kv_cache.dtype) or many else 3,
    )


@triton.jit(
    do_not_specialize=["start"],
    do_not_specialize_on_alignment=["tiles", "ends"],
)
def _score(
    query,
    kv_cache,
    block_table,
    tiles,
    ends,
    key_scale,
    logits,
    maxima,
    sums,
    scale,
    start,
    width,
    num_heads,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """`logits[r, h, t - start] = scale * query[r, h] . key[t, h // GROUP]` of the rows of a tile.

    Beside them, of every part `p` of the candidates, `maxima[r, h, p] = max over t of logits` and
    `sums[r, h, p] = sum over t of exp(logits - maxima)`. The scores are those of
    `reference.score_paged_keys`.
    """
    # KV heads vary fastest: the keys that they read lie beside each other.
    kv_head, share, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2) // SPLITS
    seq = tl.load(tiles + tile * 3).to(tl.int64)
    first_row = tl.load(tiles + tile * 3 + 1)
    num_rows = tl.load(tiles + tile * 3 + 2)

    # A line is one query head of one row.
    line = tl.program_id(2) % SPLITS * LINES + tl.arange(0, LINES)
    row, head = first_row + line // GROUP, kv_head * GROUP + line % GROUP
    in_tile = line < num_rows * GROUP
    # [LINES]
    end = tl.load(ends + row, in_tile, start)
    # All reuse selections, say; a kernel of more lines, which are seldom all without candidates, would
    # run out of registers for it.
    if LINES <= 64:  # noqa: SIM102 (known when the kernel is compiled)
        if tl.max(end, 0) <= start:
            return
    row_head = row.to(tl.int64) * num_heads + head

    element = tl.arange(0, PADDED_SIZE)
    in_head = element < HEAD_SIZE
    # [LINES, PADDED_SIZE]
    queries = tl.load(
        query + row_head[:, None] * HEAD_SIZE + element[None, :],
        in_tile[:, None] & in_head[None, :],
        0.0,
    )
    if QUANTIZED:
        scale = scale * tl.load(key_scale)
        if not WIDEN:
            queries = queries.to(tl.bfloat16)
    elif not WIDEN:
        queries = queries.to(kv_cache.dtype.element_ty)

    # Every part has the same number of steps, of the row that reaches furthest; the last may have none.
    reach = tl.max(end, 0)
    part = tl.cdiv(tl.cdiv(tl.maximum(reach - start, 0), TOKENS), PARTS) * TOKENS
    parts = tl.cdiv(PARTS, tl.num_programs(1))
    part_of = row_head * PARTS + share * parts
    first = start + share * parts * part
    last = tl.minimum(first + parts * part, reach)
    read = tl.cdiv(tl.maximum(last - first, 0), tl.maximum(part, 1))
    unread = tl.minimum(parts, PARTS - share * parts) - read

    largest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    left = part
    for position in tl.range(first, last, TOKENS):
        token = position + tl.arange(0, TOKENS)
        visible = token < last
        # [TOKENS]
        block = tl.load(block_table + seq * table_stride + token // BLOCK_SIZE, visible, 0)
        source = block.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * token_stride
        # [PADDED_SIZE, TOKENS]
        keys = tl.load(
            kv_cache + kv_head.to(tl.int64) * head_stride + source[None, :] + element[:, None],
            visible[None, :] & in_head[:, None],
            0.0,
        )
        if WIDEN:
            score = tl.dot(queries, keys.to(tl.float32), input_precision="ieee") * scale
        else:
            score = tl.dot(queries, keys.to(queries.dtype)) * scale
        own = token[None, :] < tl.minimum(end, last)[:, None]
        # [LINES, TOKENS]
        tl.store(logits + row_head[:, None] * width + (token - start)[None, :], score, own)
        score = tl.where(own, score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
        # One loop over all parts: it loads the next keys while it works on these.
        left -= TOKENS
        ends_part = tl.minimum(left, last - position - TOKENS) <= 0
        done = line < tl.where(ends_part, num_rows * GROUP, 0)
        # [LINES]
        tl.store(maxima + part_of, above, done)
        tl.store(sums + part_of, total, done)
        part_of += ends_part.to(tl.int32)
        left = tl.where(ends_part, part, left)
        largest = tl.where(ends_part, float("-inf"), above)
        total = tl.where(ends_part, 0.0, total)
    for _ in range(0, unread):
        tl.store(maxima + part_of, float("-inf"), in_tile)
        tl.store(sums + part_of, 0.0, in_tile)
        part_of += 1
