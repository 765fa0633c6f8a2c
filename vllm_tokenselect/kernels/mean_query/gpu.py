"""Mean queries on a GPU: one program a row and head."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS_PER_STEP = 32


def mean_queries(
    query: torch.Tensor, query_start: torch.Tensor, query_len: torch.Tensor, out: torch.Tensor
) -> None:
    """As `reference.mean_queries`, into `out` fp32 [R, Hq, D], contiguous.

    The last dimension of `query` is contiguous.
    """
    num_rows, num_heads, head_size = out.shape
    if not num_rows:
        return
    _mean_queries[(num_heads, num_rows)](
        query,
        query_start,
        query_len,
        out,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        PADDED_SIZE=triton.next_power_of_2(head_size),
        TOKENS=TOKENS_PER_STEP,
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=["query_start", "query_len"])
def _mean_queries(
    query,
    query_start,
    query_len,
    out,
    token_stride,
    head_stride,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`out[r, h] = sum of query[start .. start + length, h] / length`, in fp32.

    As `reference.mean_queries`.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.load(query_len + row)
    element = tl.arange(0, PADDED_SIZE)
    in_head = element < HEAD_SIZE
    total = tl.zeros([PADDED_SIZE], tl.float32)
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        source = query + (start + token)[:, None] * token_stride + head * head_stride
        visible = (token < length)[:, None] & in_head[None, :]
        # [TOKENS, PADDED_SIZE] -> [PADDED_SIZE]
        total += tl.sum(tl.load(source + element[None, :], visible, 0.0).to(tl.float32), 0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    target = out + (row.to(tl.int64) * tl.num_programs(0) + head) * HEAD_SIZE
    # [PADDED_SIZE]
    tl.store(target + element, mean, in_head)
