"""Attention of single queries on a CPU: keys and values are read where they lie, once a KV head.

Every row's tokens are cut into splits of a size that follows from their number alone, whatever the
batch and the number of threads: a row's result never depends on its neighbors. A split leaves its
maximum, its sum of weights and its weighted values; the rows then combine their splits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_tokenselect.kernels.attend.cpu_split import (
    MAX_SPLIT_TOKENS,
    attend_split,
)
from vllm_tokenselect.kernels.cpu_atomic import count_up
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import narrow
from vllm_tokenselect.kernels.cpu_tiles import PREFETCH_TOKENS, TILE_TOKENS, prefetch_listed
from vllm_tokenselect.kernels.cpu_vectors import exponential, largest


@compile_once(parallel=True)
def attend_rows(
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
    cos_sin,
    sinks,
    soft_cap,
    out,
):
    """`out = softmax(cap(scale * q . K), sinks) . V` over the tokens of each row.

    As `reference.attend_single_queries`; queries, elements and tables as in `cpu_arrays`.
    """
    num_rows = len(query_index)
    longest = 0
    for row in range(num_rows):
        longest = max(longest, lengths[row])
    num_splits = _num_splits(longest)
    group = num_heads // num_kv_heads
    maxima = np.empty((num_rows, num_heads, num_splits), np.float32)
    totals = np.empty((num_rows, num_heads, num_splits), np.float32)
    weighted = np.empty((num_rows, num_splits, num_heads, head_size), np.float32)
    flat_maxima, flat_totals, flat_weighted = maxima.ravel(), totals.ravel(), weighted.ravel()
    finished = np.zeros(num_rows * num_kv_heads, np.int64)  # splits
    for work in prange(num_rows * num_kv_heads * num_splits):
        split = work % num_splits
        row, kv_head = work // num_splits // num_kv_heads, work // num_splits % num_kv_heads
        size = _split_tokens(lengths[row])
        used = (lengths[row] + size - 1) // size
        is_last = split == 0 and used == 0
        if split < used:
            first, last = split * size, min((split + 1) * size, lengths[row])
            head = kv_head * group
            # The next split is this thread's too, mostly: its first keys are asked for by this one.
            listed = min(last + PREFETCH_TOKENS, lengths[row])
            starts = _list_tokens(
                slots, row, first, listed, block_size, num_kv_heads, kv_head, head_size
            )
            if split == 0:
                for begin in range(0, PREFETCH_TOKENS, TILE_TOKENS):
                    prefetch_listed(elements, starts, begin, 0, head_size)
            attend_split(
                queries,
                query_index[row] * query_distance + head * head_size,
                group,
                elements,
                starts,
                first,
                last - first,
                block_size * head_size,
                head_size,
                scale,
                cos_sin,
                lengths[row] - 1,
                soft_cap,
                flat_maxima,
                flat_totals,
                (row * num_heads + head) * num_splits + split,
                num_splits,
                flat_weighted,
                ((row * num_splits + split) * num_heads + head) * head_size,
            )
            is_last = count_up(finished, work // num_splits) == used - 1
        if is_last:
            for head in range(kv_head * group, (kv_head + 1) * group):
                target = (query_index[row] * num_heads + head) * head_size
                _combine(maxima, totals, weighted, row, head, used, sinks, out, target, head_size)


@njit
def _num_splits(length):
    """An even number, so that two threads have the same work even with one row and one KV head."""
    splits = (length + MAX_SPLIT_TOKENS - 1) // MAX_SPLIT_TOKENS
    return splits + splits % 2


@njit
def _split_tokens(length):
    """Tokens of each split, in whole tiles: nearly equal, so that no thread waits for another."""
    splits = max(_num_splits(length), 1)
    tiles = (length + TILE_TOKENS - 1) // TILE_TOKENS
    return max((tiles + splits - 1) // splits, 1) * TILE_TOKENS


@njit
def _list_tokens(slots, row, first, last, block_size, num_kv_heads, kv_head, head_size):
    """Where the keys of a row's slots start, and the last one again until a tile is full."""
    num_tokens = last - first
    starts = np.empty((num_tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS, np.int64)
    head_stride = 2 * block_size * head_size
    offset, start, previous = np.uint32(0), np.int64(0), np.uint32(0)
    for token in range(num_tokens):
        slot = np.uint32(slots[row, first + token])
        if token > 0 and slot == previous + np.uint32(1) and offset + 1 < block_size:
            # The next one of its block, as most are: a division would cost as much as its products.
            offset += np.uint32(1)
            start += head_size
        else:
            block = slot // np.uint32(block_size)
            offset = slot - block * np.uint32(block_size)
            start = (np.int64(block) * num_kv_heads + kv_head) * head_stride + offset * head_size
        starts[token] = start
        previous = slot
    starts[num_tokens:] = start
    return starts


@njit(error_model="numpy")  # a NaN among the scores is no error
def _combine(maxima, totals, weighted, row, head, num_splits, sinks, out, target, head_size):
    """Weigh the splits of one head against each other, and its sink; no split at all gives zeros."""
    combined = np.zeros(head_size, np.float32)
    if num_splits > 0:
        highest = largest(maxima[row, head, :num_splits])
        total = np.float32(0)
        if len(sinks) > 0:
            highest = max(highest, sinks[head])
            total = exponential(sinks[head] - highest)
        for split in range(num_splits):
            total += totals[row, head, split] * exponential(maxima[row, head, split] - highest)
        for split in range(num_splits):
            share = exponential(maxima[row, head, split] - highest) / total
            part = weighted[row, split, head]
            for i in range(head_size):
                combined[i] += share * part[i]
    narrow(combined, out, target)
