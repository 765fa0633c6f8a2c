"""Scores on a CPU: the keys are read where they lie, without a copy of the context."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_arrays import cache_elements, int32_array, padded_queries
from vllm_tokenselect.kernels.cpu_bf16 import (
    BF16_LANES,
    dot_bf16_tile,
    holds_bf16,
    padded_size,
    place_tile,
    truncate,
)
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import copy_run
from vllm_tokenselect.kernels.cpu_tiles import (
    PREFETCH_TOKENS,
    TILE_TOKENS,
    dot_tile,
    prefetch_listed,
    widen_listed,
)
from vllm_tokenselect.kernels.cpu_vectors import LANES

# Tokens of one work item: enough to hide what an item costs, few enough to fill all threads.
ITEM_TOKENS = 512


def score_paged_keys(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    start: int,
    ends: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `reference.score_paged_keys`; consecutive rows of one request share the reading of its keys.

    A bf16 query's products with bf16 keys are added up in another order than those of an fp32 query.
    """
    num_rows, num_heads, head_size = query.shape
    ends_array = int32_array(ends)
    width = max(int(ends_array.max(initial=0)) - start, 0)
    logits = torch.empty((num_rows, num_heads, width), dtype=torch.float32)
    if width:
        score_rows(
            padded_queries(query, LANES),
            query.dtype == torch.bfloat16,
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
    is_bf16,
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
    `is_bf16` says that all numbers of `query` are bf16 ones.
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
            is_bf16,
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
    is_bf16,
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
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    width = logits.shape[2]
    queries, scores = query.reshape(-1), logits.reshape(-1)
    end_of_run = 0
    for row in range(first_row, last_row):
        end_of_run = max(end_of_run, ends[row])
    reach = min(last, end_of_run)
    if first < reach:
        lines = np.empty((last_row - first_row) * group, np.int64)
        seen = np.empty(len(lines), np.int64)
        for index in range(len(lines)):
            row = first_row + index // group
            lines[index] = row * num_heads + kv_head * group + index % group
            seen[index] = min(ends[row], reach) - first
        # The next item is this thread's too, mostly: its first keys are asked for by this one.
        listed = min(reach + PREFETCH_TOKENS, end_of_run)
        starts = _list_keys(
            block_table, seq, first, listed, kv_head, num_kv_heads, block_size, head_size
        )
        if first == start:
            for begin in range(0, PREFETCH_TOKENS, TILE_TOKENS):
                prefetch_listed(elements, starts, begin, 0, head_size)
        if is_bf16 and holds_bf16(elements):
            _score_in_place(
                queries,
                query.shape[2],
                lines,
                seen,
                scale,
                elements,
                starts,
                reach - first,
                head_size,
                scores,
                width,
                first - start,
            )
        else:
            _score_widened(
                queries,
                query.shape[2],
                lines,
                seen,
                scale,
                elements,
                starts,
                reach - first,
                head_size,
                scores,
                width,
                first - start,
            )
    for row in range(first_row, last_row):
        for head in range(kv_head * group, (kv_head + 1) * group):
            line = (row * num_heads + head) * width - start
            for token in range(max(min(ends[row], reach), first), last):
                scores[line + token] = -np.inf


@njit
def _list_keys(block_table, seq, first, last, kv_head, num_kv_heads, block_size, head_size):
    """Where the keys of positions [first, last) start, and the last one again until a tile is full."""
    num_tokens = last - first
    starts = np.empty((num_tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS, np.int64)
    token = 0
    while token < num_tokens:
        position = first + token
        offset = position % block_size
        block = np.int64(block_table[seq, position // block_size])
        key = ((block * num_kv_heads + kv_head) * 2 * block_size + offset) * head_size
        count = min(block_size - offset, num_tokens - token)
        for i in range(count):
            starts[token + i] = key + i * head_size
        token += count
    starts[num_tokens:] = starts[num_tokens - 1]
    return starts


@njit
def _score_widened(
    queries,
    stride,
    lines,
    seen,
    scale,
    elements,
    starts,
    num_tokens,
    head_size,
    scores,
    width,
    column,
):
    """Write the scores of the first `num_tokens` keys, which start at `starts` of `elements`.

    Of `queries` [lines, stride], flat, those in `lines` ask, and each sees the first `seen` keys. Theirs
    are the same lines of `scores` [lines, width], flat, from `column` on.
    """
    tile = np.zeros(TILE_TOKENS * stride, np.float32)  # [tokens, D']
    dots = np.empty(TILE_TOKENS, np.float32)
    for begin in range(0, num_tokens, TILE_TOKENS):
        count = min(TILE_TOKENS, num_tokens - begin)
        prefetch_listed(elements, starts, begin + PREFETCH_TOKENS, 0, head_size)
        widen_listed(elements, starts, begin, count, 0, head_size, tile, stride)
        for index in range(len(lines)):
            own, target = seen[index] - begin, lines[index] * width + column + begin
            # [D'] . [tokens, D'] -> [tokens]
            if own >= TILE_TOKENS:
                dot_tile(queries, lines[index] * stride, tile, stride, scale, scores, target)
            elif own > 0:
                dot_tile(queries, lines[index] * stride, tile, stride, scale, dots, 0)
                copy_run(dots, 0, scores, target, own)


@njit
def _score_in_place(
    queries,
    stride,
    lines,
    seen,
    scale,
    elements,
    starts,
    num_tokens,
    head_size,
    scores,
    width,
    column,
):
    """As `_score_widened`, for bf16 queries and keys: these are multiplied where they lie."""
    padded = padded_size(head_size)
    num_vectors = padded // BF16_LANES
    bits = np.zeros(len(lines) * padded, np.uint16)  # [n, D']
    for index in range(len(lines)):
        truncate(queries, lines[index] * stride, head_size, bits, index * padded)
    tile = np.zeros(TILE_TOKENS * padded, np.uint16)
    places = np.empty(TILE_TOKENS, np.int64)
    dots = np.empty(TILE_TOKENS, np.float32)
    for begin in range(0, num_tokens, TILE_TOKENS):
        prefetch_listed(elements, starts, begin + PREFETCH_TOKENS, 0, head_size)
        place_tile(elements, starts, begin, TILE_TOKENS, 0, head_size, tile, places)
        for index in range(len(lines)):
            own, target = seen[index] - begin, lines[index] * width + column + begin
            # [D'] . [tokens, D'] -> [tokens]
            if own >= TILE_TOKENS:
                dot_bf16_tile(bits, index * padded, places, num_vectors, scale, scores, target)
            elif own > 0:
                dot_bf16_tile(bits, index * padded, places, num_vectors, scale, dots, 0)
                copy_run(dots, 0, scores, target, own)
