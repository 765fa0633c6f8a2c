"""Attention of single queries on a CPU: keys and values are read where they lie, once a KV head.

Every row's tokens are cut into splits of a size that follows from their number alone, whatever the
batch and the number of threads: a row's result never depends on its neighbors. A split leaves its
maximum, its sum of weights and its weighted values; the rows then combine their splits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import narrow, rotate_run
from vllm_tokenselect.kernels.cpu_tiles import TILE_TOKENS, add_tile, dot_tile, prefetch_run, widen
from vllm_tokenselect.kernels.cpu_vectors import (
    LANES,
    cap_scores,
    exponential,
    exponentials,
    largest,
)

MAX_SPLIT_TOKENS = 512


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
    stride = (head_size + LANES - 1) // LANES * LANES
    maxima = np.empty((num_rows, num_heads, num_splits), np.float32)
    totals = np.empty((num_rows, num_heads, num_splits), np.float32)
    weighted = np.empty((num_rows, num_heads, num_splits, stride), np.float32)
    for work in prange(num_rows * num_kv_heads * num_splits):
        split = work % num_splits
        row = work // num_splits // num_kv_heads
        if split * _split_tokens(lengths[row]) < lengths[row]:
            _attend_split(
                queries,
                query_index[row] * query_distance,
                elements,
                slots,
                lengths[row],
                scale,
                num_heads // num_kv_heads,
                num_kv_heads,
                block_size,
                head_size,
                cos_sin,
                soft_cap,
                row,
                work // num_splits % num_kv_heads,
                split,
                maxima,
                totals,
                weighted,
            )
    for line in prange(num_rows * num_heads):
        row, head = line // num_heads, line % num_heads
        size = _split_tokens(lengths[row])
        used = (lengths[row] + size - 1) // size
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
def _attend_split(
    queries,
    first_element,
    elements,
    slots,
    length,
    scale,
    group,
    num_kv_heads,
    block_size,
    head_size,
    cos_sin,
    soft_cap,
    row,
    kv_head,
    split,
    maxima,
    totals,
    weighted,
):
    """One split of a row's tokens, for the query heads of one KV head."""
    num_heads, stride = maxima.shape[1], weighted.shape[3]
    size = _split_tokens(length)
    first = split * size
    num_tokens = min(size, length - first)
    padded = (num_tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS
    head_stride = 2 * block_size * head_size
    padded_queries = np.zeros(group * stride, np.float32)
    for member in range(group):
        source = first_element + (kv_head * group + member) * head_size
        widen(queries, source, head_size, padded_queries, member * stride)  # [G, D']
        if cos_sin.shape[1] > 0:
            rotate_run(padded_queries, member * stride, cos_sin, length - 1)
    tile = np.zeros(TILE_TOKENS * stride, np.float32)
    weights = np.zeros(group * MAX_SPLIT_TOKENS, np.float32)
    tokens = np.empty(num_tokens, np.int64)  # where each token's key starts
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
        tokens[token] = start
        previous = slot

    for begin in range(0, num_tokens, TILE_TOKENS):
        count = min(TILE_TOKENS, num_tokens - begin)
        _widen_listed(
            elements, tokens, begin, count, 0, head_size, tile, stride
        )  # [tokens, D'], keys
        if cos_sin.shape[1] > 0:
            for token in range(count):
                rotate_run(tile, token * stride, cos_sin, first + begin + token)
        for member in range(group):
            target = member * MAX_SPLIT_TOKENS + begin
            # [D'] . [tokens, D'] -> [tokens]
            dot_tile(padded_queries, member * stride, tile, stride, scale, weights, target)

    for member in range(group):
        line = weights[member * MAX_SPLIT_TOKENS : member * MAX_SPLIT_TOKENS + padded]
        if soft_cap > 0:
            cap_scores(line, soft_cap)
        highest = largest(line[:num_tokens])
        total = exponentials(line[:num_tokens], highest)
        for token in range(num_tokens, padded):
            line[token] = 0
        head = kv_head * group + member
        maxima[row, head, split] = highest
        totals[row, head, split] = total
        weighted[row, head, split] = 0

    values = block_size * head_size
    sums = weighted.reshape(-1)
    num_splits = weighted.shape[2]
    for begin in range(0, num_tokens, TILE_TOKENS):
        count = min(TILE_TOKENS, num_tokens - begin)
        _widen_listed(
            elements, tokens, begin, count, values, head_size, tile, stride
        )  # [tokens, D']
        tile[count * stride :] = 0  # weights of zero are multiplied too, and 0 * infinity is NaN
        for member in range(group):
            line = ((row * num_heads + kv_head * group + member) * num_splits + split) * stride
            # [tokens] . [tokens, D'] -> [D']
            add_tile(sums, line, weights, member * MAX_SPLIT_TOKENS + begin, tile, stride)


@njit
def _widen_listed(elements, tokens, begin, count, shift, head_size, tile, stride):
    """Fill a tile with `count` tokens of a list, and ask for the cache lines of the next ones."""
    for token in range(begin + count, min(begin + 2 * count, len(tokens))):
        prefetch_run(elements, tokens[token] + shift, head_size)
    for token in range(count):
        source = tokens[begin + token] + shift
        widen(elements, source, head_size, tile, token * stride)


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
            part = weighted[row, head, split]
            for i in range(head_size):
                combined[i] += share * part[i]
    narrow(combined, out, target)
