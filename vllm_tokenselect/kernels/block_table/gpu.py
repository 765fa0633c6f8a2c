"""Sparse block table on a GPU: an exact radix selection, one program a row.

Votes are not negative, so their bits order as they do. Three passes over a row's votes count digits
and find the bits of the `top_k`-th highest vote; a fourth writes what is above it, and of what equals
it the lowest positions, in order of position. Votes of a step lie in the L2 cache, which is why a
row is read four times rather than sorted.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import INTERPRETED

DIGIT_BITS = (11, 11, 10)
TOKENS_PER_STEP = 2048 if INTERPRETED else 8192


def build_sparse_block_table(
    votes: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    n_init: int,
    top_k: int,
    candidate_ends: torch.Tensor,
    context_ends: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """As `reference.build_sparse_block_table`, for tensors on a GPU.

    A row with no more than `top_k` candidates reads no votes, so `votes` may be an empty [R, 0]. A
    padded row has a context end of 0 and gets a length of 0.
    """
    if not len(slots):
        return
    _build[(len(slots),)](
        votes,
        block_table,
        row_seq,
        candidate_ends,
        context_ends,
        slots,
        lengths,
        n_init,
        top_k,
        votes.stride(0),
        block_table.stride(0),
        slots.stride(0),
        BLOCK_SIZE=block_size,
        BITS_0=DIGIT_BITS[0],
        BITS_1=DIGIT_BITS[1],
        BITS_2=DIGIT_BITS[2],
        TOKENS=TOKENS_PER_STEP,
        num_warps=16,
    )


@triton.jit
def _order_key(bits):
    """Votes as integers of the same order; NaN (and -0) count as zero."""
    return tl.where((bits > 0x7F800000) | (bits < 0), 0, bits)


@triton.jit
def _write_range(
    line, first, last, entry, slots_line, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr
):
    """Write the slots of positions [first, last) from `entry` on."""
    for position in range(first, last, TOKENS):
        token = position + tl.arange(0, TOKENS)
        visible = token < last
        block = tl.load(line + token // BLOCK_SIZE, visible, 0)
        slot = block * BLOCK_SIZE + token % BLOCK_SIZE
        tl.store(slots_line + entry + token - first, slot, visible)


@triton.jit
def _find_digit(
    votes_line,
    num_candidates,
    wanted,
    prefix,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The next digit of the threshold, and how many of the votes that share it are still wanted."""
    bins: tl.constexpr = 1 << BITS
    counts = tl.zeros([bins], tl.int32)
    for first in range(0, num_candidates, TOKENS):
        token = first + tl.arange(0, TOKENS)
        visible = token < num_candidates
        key = _order_key(tl.load(votes_line + token, visible, 0.0).to(tl.int32, bitcast=True))
        # The shift is cut in two: shifting 32 bits by 32 is undefined.
        decided = (key >> (SHIFT + BITS - 1)) >> 1
        counts += tl.histogram((key >> SHIFT) & (bins - 1), bins, visible & (decided == prefix))
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, bins) > digit, counts, 0), 0)
    return (prefix << BITS) | digit, wanted - above


@triton.jit
def _build(
    votes,
    block_table,
    row_seq,
    candidate_ends,
    context_ends,
    slots,
    lengths,
    n_init,
    top_k,
    votes_stride,
    table_stride,
    slots_stride,
    BLOCK_SIZE: tl.constexpr,
    BITS_0: tl.constexpr,
    BITS_1: tl.constexpr,
    BITS_2: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = block_table + tl.load(row_seq + row).to(tl.int64) * table_stride
    slots_line = slots + row * slots_stride
    votes_line = votes + row * votes_stride
    candidate_end = tl.load(candidate_ends + row)
    context_end = tl.load(context_ends + row)
    num_candidates = candidate_end - n_init
    if num_candidates <= top_k:
        _write_range(line, 0, context_end, 0, slots_line, BLOCK_SIZE, TOKENS)
        tl.store(lengths + row, context_end)
    else:
        threshold, ties = _find_digit(
            votes_line, num_candidates, top_k, 0, BITS_1 + BITS_2, BITS_0, TOKENS
        )
        threshold, ties = _find_digit(
            votes_line, num_candidates, ties, threshold, BITS_2, BITS_1, TOKENS
        )
        threshold, ties = _find_digit(
            votes_line, num_candidates, ties, threshold, 0, BITS_2, TOKENS
        )
        _write_range(line, 0, n_init, 0, slots_line, BLOCK_SIZE, TOKENS)
        entry = n_init
        for first in range(0, num_candidates, TOKENS):
            token = first + tl.arange(0, TOKENS)
            visible = token < num_candidates
            key = _order_key(tl.load(votes_line + token, visible, 0.0).to(tl.int32, bitcast=True))
            tie = (visible & (key == threshold)).to(tl.int32)
            kept_tie = (tie != 0) & (tl.cumsum(tie, 0) <= ties)
            kept = (visible & (key > threshold)) | kept_tie
            order = tl.cumsum(kept.to(tl.int32), 0)
            position = n_init + token
            block = tl.load(line + position // BLOCK_SIZE, kept, 0)
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(slots_line + entry + order - 1, slot, kept)
            entry += tl.sum(kept.to(tl.int32), 0)
            ties -= tl.sum(kept_tie.to(tl.int32), 0)
        _write_range(line, candidate_end, context_end, entry, slots_line, BLOCK_SIZE, TOKENS)
        tl.store(lengths + row, entry + context_end - candidate_end)
