"""Mean queries on a GPU: one program a row and head."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS_PER_STEP = 32


def mean_queries(
    query: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    out: torch.Tensor,
    vote: torch.Tensor | None = None,
) -> None:
    """As `reference.mean_queries`, into `out` fp32 [R, Hq, D], contiguous.

    Args:
        query: the last dimension is contiguous.
        vote: the line `Rotation.vote`, by which the means are rotated as by `rotate.reference.rotate`;
            they stay as they are when None.
    """
    num_rows, num_heads, head_size = out.shape
    if not num_rows:
        return
    rotated = 0 if vote is None else len(vote)
    _mean_queries[(num_heads, num_rows)](
        query,
        query_start,
        query_len,
        out,
        vote,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        HALF=rotated // 2,
        PADDED_HALF=triton.next_power_of_2(max(rotated // 2, 1)),
        PADDED_REST=triton.next_power_of_2(max(head_size - rotated, 1)),
        TOKENS=TOKENS_PER_STEP,
        num_warps=4,
    )


@triton.jit
def _mean(source, length, token_stride, element, visible, TOKENS: tl.constexpr):
    """Mean of so many queries from `source` on, in some of a head's elements."""
    total = tl.zeros(element.shape, tl.float32)
    for first in range(0, length, TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)
        mask = (token < length)[:, None] & visible[None, :]
        # [TOKENS, elements] -> [elements]
        queries = tl.load(source + token[:, None] * token_stride + element[None, :], mask, 0.0)
        total += tl.sum(queries.to(tl.float32), 0)
    return total / tl.maximum(length, 1).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["query_start", "query_len"])
def _mean_queries(
    query,
    query_start,
    query_len,
    out,
    vote,
    token_stride,
    head_stride,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`out[r, h] = sum of query[start .. start + length, h] / length`, in fp32.

    As `reference.mean_queries`. Of `2 * HALF` elements a pair `(a, b) = (x[i], x[HALF + i])` becomes
    `(a cos - b sin, b cos + a sin)`, as in `rotate.reference.rotate`.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.load(query_len + row)
    source = query + start * token_stride + head * head_stride
    target = out + (row.to(tl.int64) * tl.num_programs(0) + head) * HEAD_SIZE
    if HALF > 0:
        pair = tl.arange(0, PADDED_HALF)
        is_pair = pair < HALF
        # [PADDED_HALF]
        first = _mean(source, length, token_stride, pair, is_pair, TOKENS)
        second = _mean(source, length, token_stride, HALF + pair, is_pair, TOKENS)
        cosine = tl.load(vote + pair, is_pair, 0.0)
        sine = tl.load(vote + HALF + pair, is_pair, 0.0)
        tl.store(target + pair, first * cosine - second * sine, is_pair)
        tl.store(target + HALF + pair, second * cosine + first * sine, is_pair)
    if HEAD_SIZE > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, PADDED_REST)
        in_head = rest < HEAD_SIZE
        # [PADDED_REST]
        tl.store(target + rest, _mean(source, length, token_stride, rest, in_head, TOKENS), in_head)
