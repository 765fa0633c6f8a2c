"""A layer's work for rows of one query on a CPU, in one call of compiled code.

In decoding a layer takes a fraction of a millisecond; five calls from Python would be a third of it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from vllm_tokenselect.kernels.attend.cpu import attend_rows
from vllm_tokenselect.kernels.block_table.cpu import build_rows
from vllm_tokenselect.kernels.cpu_arrays import cache_elements, int32_array, token_elements
from vllm_tokenselect.kernels.cpu_tiles import LANES, widen
from vllm_tokenselect.kernels.score.cpu import score_rows
from vllm_tokenselect.kernels.single_queries.reference import Layer
from vllm_tokenselect.kernels.vote.cpu import vote_rows


def single_queries(
    query_index: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    n_init: int,
    top_k: int,
    candidate_ends: torch.Tensor,
    context_ends: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    selects: bool,
) -> Layer:
    """As `reference.single_queries`; `slots` and `lengths` are contiguous int32."""
    index = int32_array(query_index)
    ends = int32_array(candidate_ends)
    table = (int32_array(block_table), int32_array(row_seq), ends, int32_array(context_ends))
    lines = (slots.numpy(), lengths.numpy())
    width = max(int(ends.max(initial=0)) - n_init, 0) if selects else 0

    def layer(query: torch.Tensor, kv_cache: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        # The kernel writes fp32 and bf16 where they belong, and does not narrow to fp16.
        in_place = out.is_contiguous() and out.dtype != torch.float16
        attended = out if in_place else torch.empty_like(out, dtype=torch.float32)
        _single_queries(
            *token_elements(query),
            index,
            cache_elements(kv_cache),
            *table,
            *lines,
            n_init,
            top_k,
            width,
            np.float32(scale),
            query.shape[1],
            kv_cache.shape[1],
            block_size,
            kv_cache.shape[4],
            cache_elements(attended),
        )
        if not in_place:
            out[query_index.long()] = attended[query_index.long()].to(out.dtype)

    return layer


@njit(cache=True)
def _single_queries(
    queries,
    query_distance,
    query_index,
    elements,
    block_table,
    row_seq,
    candidate_ends,
    context_ends,
    slots,
    lengths,
    n_init,
    top_k,
    width,
    scale,
    num_heads,
    num_kv_heads,
    block_size,
    head_size,
    out,
):
    num_rows = len(query_index)
    if width > 0:
        stride = (head_size + LANES - 1) // LANES * LANES
        padded = np.zeros((num_rows, num_heads, stride), np.float32)
        flat = padded.reshape(-1)
        for line in range(num_rows * num_heads):
            row, head = line // num_heads, line % num_heads
            source = query_index[row] * query_distance + head * head_size
            widen(queries, source, head_size, flat, line * stride)
        logits = np.empty((num_rows, num_heads, width), np.float32)
        votes = np.empty((num_rows, width), np.float32)
        score_rows(
            padded,
            elements,
            block_table,
            row_seq,
            n_init,
            candidate_ends,
            scale,
            num_kv_heads,
            block_size,
            head_size,
            logits,
        )
        vote_rows(logits, votes)
        build_rows(
            votes,
            block_table,
            row_seq,
            n_init,
            top_k,
            candidate_ends,
            context_ends,
            block_size,
            slots,
            lengths,
        )
    attend_rows(
        queries,
        query_distance,
        query_index,
        elements,
        slots,
        lengths,
        scale,
        num_heads,
        num_kv_heads,
        block_size,
        head_size,
        out,
    )
