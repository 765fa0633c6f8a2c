"""Soft vote on a GPU: normalize with the scores' running maxima and sums, and add up the heads."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.block_table import gpu_digits
from vllm_tokenselect.kernels.block_table.gpu_digits import (
    EXPONENTS,
    MANTISSA_BITS,
    count_exponents,
    first_line,
    order_keys,
)
from vllm_tokenselect.kernels.score.gpu import NUM_PARTS, Scores

HEADS_PER_STEP = 4


def soft_vote(scores: Scores, votes: torch.Tensor, exponents: torch.Tensor | None = None) -> None:
    """As `reference.soft_vote`, into the rows' columns of `votes`, written below each row's own end.

    Every program works on a part of one row; fp32 throughout.

    Args:
        votes: fp32 [C], of all columns, from the one on that is numbered 0.
        exponents: int16 [lines, EXPONENTS], written for the parts of each row, whose lines
            `gpu_digits.first_line` tells: how often each exponent occurs among their votes, which is where
            building a table begins. None leaves it out.
    """
    assert scores.logits is not None  # `gpu_rescoring` votes without them
    num_heads, num_columns = scores.logits.shape
    num_rows, width = scores.columns.num_rows, scores.columns.widest
    if not num_rows or not width:
        return
    _soft_vote[(gpu_digits.num_parts(width), num_rows)](
        scores.columns.starts,
        scores.logits,
        scores.maxima,
        scores.sums,
        scores.ends,
        votes,
        exponents,
        scores.start,
        num_columns,
        HEADS=num_heads,
        STEP=min(triton.next_power_of_2(num_heads), HEADS_PER_STEP),
        PARTS=NUM_PARTS,
        TOKENS=gpu_digits.PART_TOKENS,
        EXPONENTS=EXPONENTS,
        MANTISSA_BITS=MANTISSA_BITS,
        num_warps=16,
    )


@triton.jit(
    do_not_specialize=["start"],
    do_not_specialize_on_alignment=["ends", "columns"],
)
def _soft_vote(
    columns,
    logits,
    maxima,
    sums,
    ends,
    votes,
    exponents,
    start,
    num_columns,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPONENTS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """`votes[r, t] = sum over h of exp(logits[r, h, t] - M[r, h]) / Z[r, h]`, as `reference.soft_vote`.

    `votes[r, t]` lies in column `columns[r] + t`, and `logits[r, h, t]` in head `h`'s column
    `columns[r] - columns[0] + t`.

    Known of each part `p` of the candidates: `m[r, h, p]`, the largest score, and `z[r, h, p]`, the sum
    of `exp(score - m)`. So `M = max over p of m` and `Z = sum over p of z * exp(m - M)`.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_candidates = tl.load(ends + row) - start
    if part * TOKENS < num_candidates:
        token = part * TOKENS + tl.arange(0, TOKENS)
        visible = token < num_candidates
        # Whole 16 bytes are loaded at once; what lies behind the candidates is not looked at.
        loaded = token < tl.cdiv(num_candidates, 4) * 4
        first_column = tl.multiple_of(tl.load(columns + row), 4)
        scored = tl.multiple_of(first_column - tl.load(columns), 4)
        vote = tl.zeros([TOKENS], tl.float32)
        for first in range(0, HEADS, STEP):
            head, split = first + tl.arange(0, STEP), tl.arange(0, PARTS)
            is_head = head < HEADS
            # [STEP, TOKENS]
            score = tl.load(
                logits + head.to(tl.int64)[:, None] * num_columns + scored + token[None, :],
                is_head[:, None] & loaded[None, :],
                float("-inf"),
            )
            part_of = (row * HEADS + head)[:, None] * PARTS + split[None, :]
            is_part = is_head[:, None] & (split >= 0)[None, :]
            # [STEP, PARTS]
            part_largest = tl.load(maxima + part_of, is_part, float("-inf"))
            part_total = tl.load(sums + part_of, is_part, 0.0)
            # [STEP]
            largest = tl.max(part_largest, 1)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(part_total * tl.exp(part_largest - largest[:, None]), 1)
            weight = tl.where(total > 0, 1 / total, 0.0)
            vote += tl.sum(tl.exp(score - largest[:, None]) * weight[:, None], 0)
        # [TOKENS]
        tl.store(votes + first_column + token, vote, visible)
        if exponents is not None:
            counts = count_exponents(order_keys(vote), visible, EXPONENTS, MANTISSA_BITS)
            line = exponents + (first_line(first_column, row, TOKENS) + part) * EXPONENTS
            # [EXPONENTS]
            tl.store(line + tl.arange(0, EXPONENTS), counts)
