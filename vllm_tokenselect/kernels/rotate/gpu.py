"""Rotation of queries on a GPU; keys are rotated while they are gathered."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import num_programs_wanted

TOKENS_PER_STEP = 16


def rotate_queries(
    query: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    max_query_len: int,
    lengths: torch.Tensor,
    cos_sin: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As `reference.rotate_queries`.

    Args:
        query: the last dimension is contiguous.
        max_query_len: most queries of a row.
        out: contiguous.
    """
    num_rows, (num_heads, head_size) = len(query_len), query.shape[1:]
    if not num_rows or not max_query_len:
        return
    rotated = cos_sin.shape[1]
    parts = min(
        triton.cdiv(max_query_len, TOKENS_PER_STEP),
        triton.cdiv(num_programs_wanted(), num_rows * num_heads),
    )
    _rotate_queries[(num_heads, parts, num_rows)](
        query,
        query_start,
        query_len,
        lengths,
        cos_sin,
        out,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        ROTATED=rotated,
        PADDED_HALF=triton.next_power_of_2(rotated // 2),
        PADDED_REST=triton.next_power_of_2(max(head_size - rotated, 1)),
        TOKENS=TOKENS_PER_STEP,
        num_warps=4,
    )


@triton.jit
def _rotate(source, target, cosine, sine, visible, HALF: tl.constexpr, PADDED_HALF: tl.constexpr):
    """Rotate the heads that start at `source` into those at `target`.

    The pair `(a, b) = (x[i], x[HALF + i])` becomes `(a cos - b sin, b cos + a sin)`, as in
    `reference.rotate`.
    """
    pair = tl.arange(0, PADDED_HALF)[None, :]
    mask = visible[:, None] & (pair < HALF)
    # [n, PADDED_HALF]
    first = tl.load(source[:, None] + pair, mask, 0.0).to(tl.float32)
    second = tl.load(source[:, None] + HALF + pair, mask, 0.0).to(tl.float32)
    tl.store(target[:, None] + pair, first * cosine - second * sine, mask)
    tl.store(target[:, None] + HALF + pair, second * cosine + first * sine, mask)


@triton.jit(do_not_specialize_on_alignment=["query_start", "query_len", "lengths"])
def _rotate_queries(
    query,
    query_start,
    query_len,
    lengths,
    cos_sin,
    out,
    token_stride,
    head_stride,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Rotate one head of a part of a row's queries: query `i` of `n` to position `length - n + i`.

    As `reference.rotate_queries`.
    """
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + row).to(tl.int64)
    num_queries = tl.load(query_len + row)
    first_position = tl.load(lengths + row) - num_queries
    half: tl.constexpr = ROTATED // 2
    pair = tl.arange(0, PADDED_HALF)[None, :]
    for first in range(part * TOKENS, num_queries, tl.num_programs(1) * TOKENS):
        token = first + tl.arange(0, TOKENS)
        position = first_position + token
        # A row without tokens, of a request that only fills up a batch, has no position to rotate to.
        visible = (token < num_queries) & (position >= 0)
        line = cos_sin + position[:, None] * ROTATED + pair
        in_line = visible[:, None] & (pair < half)
        # [TOKENS, PADDED_HALF]
        cosine = tl.load(line, in_line, 0.0)
        sine = tl.load(line + half, in_line, 0.0)
        source = query + (start + token) * token_stride + head * head_stride
        target = out + ((start + token) * tl.num_programs(0) + head) * HEAD_SIZE
        _rotate(source, target, cosine, sine, visible, half, PADDED_HALF)
        if HEAD_SIZE > ROTATED:
            rest = ROTATED + tl.arange(0, PADDED_REST)[None, :]
            mask = visible[:, None] & (rest < HEAD_SIZE)
            # [TOKENS, PADDED_REST]
            tl.store(target[:, None] + rest, tl.load(source[:, None] + rest, mask, 0.0), mask)
