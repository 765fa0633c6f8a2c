"""Soft vote on a GPU: normalize with the scores' running maxima and sums, and add up the heads."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import num_programs_wanted
from vllm_tokenselect.kernels.score.gpu import NUM_PARTS, Scores

SCORES_PER_STEP = 8192  # of all heads


def soft_vote(scores: Scores, votes: torch.Tensor) -> None:
    """As `reference.soft_vote`, into `votes` fp32 [R, N], written below each row's own end.

    Every program works through a part of one row; fp32 throughout.
    """
    num_rows, num_heads, width = scores.logits.shape
    if not num_rows or not width:
        return
    padded_heads = triton.next_power_of_2(num_heads)
    tokens = max(SCORES_PER_STEP // padded_heads, 16)
    parts = min(triton.cdiv(width, tokens), triton.cdiv(num_programs_wanted(), num_rows))
    _soft_vote[(parts, num_rows)](
        scores.logits,
        scores.maxima,
        scores.sums,
        scores.ends,
        votes,
        scores.start,
        width,
        votes.stride(0),
        HEADS=num_heads,
        PADDED_HEADS=padded_heads,
        PARTS=NUM_PARTS,
        TOKENS=tokens,
        num_warps=8,
    )


@triton.jit(
    do_not_specialize=["start"],
    do_not_specialize_on_alignment=["ends"],
)
def _soft_vote(
    logits,
    maxima,
    sums,
    ends,
    votes,
    start,
    width,
    votes_stride,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`votes[r, t] = sum over h of exp(logits[r, h, t] - M[r, h]) / Z[r, h]`, as `reference.soft_vote`.

    Known of each part `p` of the candidates: `m[r, h, p]`, the largest score, and `z[r, h, p]`, the sum
    of `exp(score - m)`. So `M = max over p of m` and `Z = sum over p of z * exp(m - M)`.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_candidates = tl.load(ends + row) - start
    if part * TOKENS < num_candidates:
        head, split = tl.arange(0, PADDED_HEADS), tl.arange(0, PARTS)
        is_head = head < HEADS
        part_of = (row * HEADS + head)[:, None] * PARTS + split[None, :]
        is_part = is_head[:, None] & (split >= 0)[None, :]
        # [PADDED_HEADS, PARTS]
        part_largest = tl.load(maxima + part_of, is_part, float("-inf"))
        part_total = tl.load(sums + part_of, is_part, 0.0)
        # [PADDED_HEADS]
        largest = tl.max(part_largest, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(part_total * tl.exp(part_largest - largest[:, None]), 1)
        weight = tl.where(total > 0, 1 / total, 0.0)
        for first in range(part * TOKENS, num_candidates, tl.num_programs(0) * TOKENS):
            token = first + tl.arange(0, TOKENS)
            visible = token < num_candidates
            # [PADDED_HEADS, TOKENS]
            score = tl.load(
                logits + (row * HEADS + head)[:, None] * width + token[None, :],
                is_head[:, None] & visible[None, :],
                float("-inf"),
            )
            share = tl.exp(score - largest[:, None]) * weight[:, None]
            # [TOKENS]
            tl.store(votes + row * votes_stride + token, tl.sum(share, 0), visible)
