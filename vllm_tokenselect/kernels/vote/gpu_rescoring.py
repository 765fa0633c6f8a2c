"""Soft vote on a GPU that computes the scores again, in place of reading what was stored.

Chunks of a prompt share the reading of their keys. A key has two bytes an element, and a score four bytes
for each chunk and query head: writing and reading the scores of many chunks takes longer than reading the
keys once more, and they fill the workspace. So `score_paged_keys` leaves the maxima and sums only, and here
a program adds up the votes of some tokens, head by head.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import (
    INTERPRETED,
    SMALLEST_PRODUCT,
    is_fp8,
    num_multiprocessors,
)
from vllm_tokenselect.kernels.score.gpu import NUM_PARTS, TRITON_DTYPES, Product, Scores


def vote_rescoring(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    rows_per_tile: int,
    scale: float,
    key_scale: torch.Tensor | None,
    scores: Scores,
    votes: torch.Tensor,
    programs: int | None = None,
) -> None:
    """As `reference.soft_vote` of `reference.score_paged_keys`, written below each row's own end.

    What is written of a row depends on no other row. Exponents are not counted.

    Args:
        query: fp32 [R, Hq, D], contiguous, one a row.
        kv_cache, block_table, tiles, rows_per_tile, scale, key_scale: as `score_paged_keys` had them.
        scores: their maxima and sums; no logits are read.
        votes: fp32 [C], of all columns, from the one on that is numbered 0.
        programs: that share the tokens of a tile; chosen when None. The result is the same.
    """
    if not len(tiles):
        return
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    padded_group = triton.next_power_of_2(group)
    product = Product.of(query, kv_cache)
    needed = max(triton.next_power_of_2(rows_per_tile) * padded_group, SMALLEST_PRODUCT)
    lines = min(needed, product.most_lines)
    heads = min(padded_group, lines)  # of a KV head, at once
    splits = triton.cdiv(rows_per_tile, lines // heads)  # of a tile, whose rows programs share
    many, quantized = lines > 64 or lines == product.most_lines, is_fp8(kv_cache.dtype)
    if programs is None:
        # Every program reads all queries of its rows, so there are no more than run at once.
        wanted = triton.cdiv(num_multiprocessors(), splits * len(tiles))
        programs = max(min(wanted, triton.cdiv(scores.columns.widest, product.tokens)), 1)
    vote_tile[(splits * len(tiles), programs)](
        query,
        kv_cache,
        block_table,
        tiles,
        scores.ends,
        scores.columns.starts,
        key_scale,
        scores.maxima,
        scores.sums,
        votes,
        scale,
        scores.start,
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(3),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEADS=heads,
        HEAD_SIZE=head_size,
        PADDED_SIZE=product.padded_size,
        BLOCK_SIZE=block_size,
        LINES=lines,
        SPLITS=splits,
        TOKENS=product.tokens,
        PARTS=NUM_PARTS,
        PRODUCT=TRITON_DTYPES[product.dtype],
        PRODUCTS=product.parts,
        WIDEN=INTERPRETED,  # Triton's interpreter multiplies bf16 bits as if they were integers
        QUANTIZED=quantized,
        num_warps=8 if many or product.padded_size > 256 else 4,
        # The queries of heads of 256 elements leave no registers to load keys ahead.
        num_stages=1 if product.padded_size == 256 else 2,
    )


@triton.jit(
    do_not_specialize=["start"],
    do_not_specialize_on_alignment=["tiles", "ends", "columns"],
)
def vote_tile(
    query,
    kv_cache,
    block_table,
    tiles,
    ends,
    columns,
    key_scale,
    maxima,
    sums,
    votes,
    scale,
    start,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """`votes[columns[r] + c] = sum over h of exp(score[r, h, c] - M[r, h]) / Z[r, h]`, of a tile's rows.

    `score[r, h, c] = scale * query[r, h] . key[start + c, h // GROUP]`, as in `score_tile`. `M` and `Z`
    follow from the maxima and sums of parts, as in `_soft_vote`. A step takes the heads that share a KV
    head, or some of them. Their votes are added up in registers, and those of all steps in memory.
    """
    ROWS: tl.constexpr = LINES // HEADS
    STEPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # of a KV head
    tile, split, share = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS, tl.program_id(1)
    seq = tl.load(tiles + tile * 3).to(tl.int64)
    first_row = tl.load(tiles + tile * 3 + 1) + split * ROWS
    num_rows = tl.load(tiles + tile * 3 + 2) - split * ROWS

    in_tile = tl.arange(0, ROWS) < num_rows
    row = first_row + tl.arange(0, ROWS)
    # [ROWS]
    length = tl.maximum(tl.load(ends + row, in_tile, start) - start, 0)
    column = tl.multiple_of(tl.load(columns + row, in_tile, 0), 4)
    reach = tl.max(length, 0)
    share_size = tl.cdiv(tl.cdiv(reach, TOKENS), tl.num_programs(1)) * TOKENS
    first = tl.multiple_of(share * share_size, TOKENS)
    last = tl.minimum(first + share_size, reach)
    if QUANTIZED:
        scale = scale * tl.load(key_scale)

    line, element, split_part = tl.arange(0, LINES), tl.arange(0, PADDED_SIZE), tl.arange(0, PARTS)
    in_head = element < HEAD_SIZE
    first_row_head = first_row.to(tl.int64) * (KV_HEADS * GROUP)
    # [LINES], of all heads of these rows
    own_head = line // HEADS * (KV_HEADS * GROUP) + line % HEADS
    # Programs that the tile is too short for go through no heads.
    num_steps = tl.where(first < last, KV_HEADS * STEPS, 0)
    for step in range(0, num_steps):
        kv_head, first_head = step // STEPS, step % STEPS * HEADS  # of those that share the KV head
        asks = (line // HEADS < num_rows) & (first_head + line % HEADS < GROUP)
        row_head = first_row_head + kv_head * GROUP + first_head
        part_of = row_head * PARTS + (own_head * PARTS)[:, None] + split_part[None, :]
        is_part = asks[:, None] & (split_part >= 0)[None, :]
        # [LINES, PARTS]
        part_largest = tl.load(maxima + part_of, is_part, float("-inf"))
        part_total = tl.load(sums + part_of, is_part, 0.0)
        # [LINES]
        largest = tl.max(part_largest, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(part_total * tl.exp(part_largest - largest[:, None]), 1)
        # A head's vote is exp(score - largest) / total.
        shift = tl.where(total > 0, largest + tl.log(total), float("inf"))
        # [LINES, PADDED_SIZE]
        queries = tl.load(
            query + row_head * HEAD_SIZE + (own_head * HEAD_SIZE)[:, None] + element[None, :],
            asks[:, None] & in_head[None, :],
            0.0,
        )
        high = queries.to(PRODUCT)
        low = high
        if PRODUCTS == 2:
            low = (queries - high.to(tl.float32)).to(PRODUCT)
        if WIDEN:
            high, low = high.to(tl.float32), low.to(tl.float32)
        for offset in tl.range(first, last, TOKENS):
            candidate = offset + tl.arange(0, TOKENS)
            visible = candidate < last
            token = start + candidate
            # [TOKENS]
            block = tl.load(block_table + seq * table_stride + token // BLOCK_SIZE, visible, 0)
            place = block.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * token_stride
            # [PADDED_SIZE, TOKENS]
            keys = tl.load(
                kv_cache
                + tl.cast(kv_head, tl.int64) * head_stride
                + place[None, :]
                + element[:, None],
                visible[None, :] & in_head[:, None],
                0.0,
            ).to(high.dtype)
            # [LINES, TOKENS]
            if PRODUCTS == 2:
                score = tl.dot(low, keys, input_precision="ieee")
                score = tl.dot(high, keys, score, input_precision="ieee") * scale
            else:
                score = tl.dot(high, keys, input_precision="ieee") * scale
            shares = tl.reshape(tl.exp(score - shift[:, None]), [ROWS, HEADS, TOKENS])
            # [ROWS, TOKENS]
            vote = tl.sum(shares, 1)
            own = candidate[None, :] < tl.minimum(length, last)[:, None]
            target = votes + (column[:, None] + candidate[None, :])
            vote += tl.load(target, own & (step > 0), 0.0)
            tl.store(target, vote, own)
        # The next step's loads may be other threads' than this one's stores.
        tl.debug_barrier()
