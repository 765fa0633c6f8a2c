"""Scores on a CPU: the keys are read where they lie, without a copy of the context."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_arrays import cache_elements, int32_array, padded_queries
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_tiles import TILE_TOKENS, dot_tile, prefetch_run, widen_tokens
from vllm_tokenselect.kernels.cpu_vectors import LANES

# Tokens of one work item: enough to hide what an item costs, few enough to fill all threads.
ITEM_TOKENS = 512
PREFETCH_TOKENS = 2 * TILE_TOKENS  # blocks lie anywhere: no processor foresees the next one


def score_paged_keys(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    start: int,
    ends: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `reference.score_paged_keys`; consecutive rows of one request share the reading of its keys."""
    num_rows, num_heads, head_size = query.shape
    ends_array = int32_array(ends)
    width = max(int(ends_array.max(initial=0)) - start, 0)
    logits = torch.empty((num_rows, num_heads, width), dtype=torch.float32)
    if width:
        score_rows(
            padded_queries(query, LANES),
            cache_elements(kv_cache),
            int32_array(block_table),
            int32_array(row_seq),
            start,
            ends_array,
            np.float32(scale),
            kv_cache.shape[1],
            kv_cache.shape[3],
            head_size,
            logits.numpy(),
        )
    return logits


@compile_once(parallel=True)
def score_rows(
    query,
    elements,
    block_table,
    row_seq,
    start,
    ends,
    scale,
    num_kv_heads,
    block_size,
    head_size,
    logits,
):
    """`logits[r, h, p - start] = scale * query[r, h] . key(p)`, head `h`'s key of position `p`.

    `query` is fp32 [R, Hq, D'] and `logits` fp32 [R, Hq, N]; D' is the head size, padded with zeros.
    """
    num_rows, _, width = logits.shape
    run_starts = np.empty(num_rows + 1, np.int64)  # runs of consecutive rows of one request
    num_runs = 0
    for row in range(num_rows):
        if row == 0 or row_seq[row] != row_seq[row - 1]:
            run_starts[num_runs] = row
            num_runs += 1
    run_starts[num_runs] = num_rows
    num_items = (width + ITEM_TOKENS - 1) // ITEM_TOKENS
    for work in prange(num_runs * num_kv_heads * num_items):
        run = work // (num_kv_heads * num_items)
        first = start + work % num_items * ITEM_TOKENS
        _score_item(
            query,
            elements,
            block_table,
            row_seq[run_starts[run]],
            run_starts[run],
            run_starts[run + 1],
            work // num_items % num_kv_heads,
            first,
            min(first + ITEM_TOKENS, start + width),
            start,
            ends,
            scale,
            num_kv_heads,
            block_size,
            head_size,
            logits,
        )


@njit
def _score_item(
    query,
    elements,
    block_table,
    seq,
    first_row,
    last_row,
    kv_head,
    first,
    last,
    start,
    ends,
    scale,
    num_kv_heads,
    block_size,
    head_size,
    logits,
):
    """Positions [first, last) of one KV head, for the rows [first_row, last_row) of one request."""
    num_heads, stride = query.shape[1], query.shape[2]
    group = num_heads // num_kv_heads
    width = logits.shape[2]
    queries, scores = query.reshape(-1), logits.reshape(-1)
    tile = np.zeros(TILE_TOKENS * stride, np.float32)
    dots = np.empty(TILE_TOKENS, np.float32)
    block_stride = 2 * num_kv_heads * block_size * head_size
    head_offset = 2 * kv_head * block_size * head_size
    end_of_run = 0
    for row in range(first_row, last_row):
        end_of_run = max(end_of_run, ends[row])
    reach = min(last, end_of_run)
    position = first
    while position < reach:
        offset = position % block_size
        num_tokens = min(TILE_TOKENS, block_size - offset, reach - position)
        block = np.int64(block_table[seq, position // block_size])
        source = block * block_stride + head_offset + offset * head_size
        ahead = position + PREFETCH_TOKENS
        if ahead < reach:
            block = np.int64(block_table[seq, ahead // block_size])
            following = block * block_stride + head_offset + ahead % block_size * head_size
            prefetch_run(elements, following, num_tokens * head_size)
        widen_tokens(elements, source, num_tokens, head_size, tile, stride)  # [tokens, D'], keys
        for row in range(first_row, last_row):
            num_visible = min(num_tokens, ends[row] - position)
            for head in range(kv_head * group, (kv_head + 1) * group):
                line = row * num_heads + head
                target = line * width + position - start
                if num_visible == TILE_TOKENS:
                    # [D'] . [tokens, D'] -> [tokens]
                    dot_tile(queries, line * stride, tile, stride, scale, scores, target)
                    continue
                if num_visible > 0:
                    dot_tile(queries, line * stride, tile, stride, scale, dots, 0)
                for token in range(num_tokens):
                    scores[target + token] = dots[token] if token < num_visible else -np.inf
        position += num_tokens
    for row in range(first_row, last_row):
        for head in range(kv_head * group, (kv_head + 1) * group):
            line = (row * num_heads + head) * width - start
            for token in range(max(position, first), last):
                scores[line + token] = -np.inf
