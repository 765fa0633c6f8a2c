"""Attention of single queries on a CPU: keys and values are read where they lie, once a KV head.

Every row's tokens are cut into splits of a fixed size, whatever the batch and the number of threads: a
row's result never depends on its neighbours. A split leaves its maximum, its sum of weights and its
weighted values; the rows then combine their splits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_arrays import cache_elements, int32_array, padded_queries
from vllm_tokenselect.kernels.cpu_tiles import (
    FAST_MATH,
    LANES,
    TILE_TOKENS,
    add_tile,
    dot_tile,
    prefetch_run,
    widen,
)

SPLIT_TOKENS = 512


def attend_single_queries(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """As `reference.attend_single_queries`."""
    attended = np.empty(query.shape, np.float32)
    _attend(
        padded_queries(query, LANES),
        cache_elements(kv_cache),
        int32_array(slots),
        int32_array(lengths),
        np.float32(scale),
        kv_cache.shape[1],
        kv_cache.shape[3],
        attended,
    )
    out.copy_(torch.from_numpy(attended))


@njit(parallel=True, fastmath=FAST_MATH, cache=True)
def _attend(query, elements, slots, lengths, scale, num_kv_heads, block_size, out):
    num_rows, num_heads, head_size = out.shape
    longest = 0
    for row in range(num_rows):
        longest = max(longest, lengths[row])
    num_splits = (longest + SPLIT_TOKENS - 1) // SPLIT_TOKENS
    stride = query.shape[2]
    maxima = np.empty((num_rows, num_heads, num_splits), np.float32)
    totals = np.empty((num_rows, num_heads, num_splits), np.float32)
    weighted = np.empty((num_rows, num_heads, num_splits, stride), np.float32)
    for work in prange(num_rows * num_kv_heads * num_splits):
        split = work % num_splits
        row = work // num_splits // num_kv_heads
        if split * SPLIT_TOKENS < lengths[row]:
            _attend_split(
                query,
                elements,
                slots,
                lengths[row],
                scale,
                num_kv_heads,
                block_size,
                head_size,
                row,
                work // num_splits % num_kv_heads,
                split,
                maxima,
                totals,
                weighted,
            )
    for line in prange(num_rows * num_heads):
        row, head = line // num_heads, line % num_heads
        used = (lengths[row] + SPLIT_TOKENS - 1) // SPLIT_TOKENS
        _combine(maxima, totals, weighted, row, head, used, out)


@njit(fastmath=FAST_MATH)
def _attend_split(
    query,
    elements,
    slots,
    length,
    scale,
    num_kv_heads,
    block_size,
    head_size,
    row,
    kv_head,
    split,
    maxima,
    totals,
    weighted,
):
    """One split of a row's tokens, for the query heads of one KV head."""
    num_heads, stride = query.shape[1], query.shape[2]
    group = num_heads // num_kv_heads
    first = split * SPLIT_TOKENS
    num_tokens = min(SPLIT_TOKENS, length - first)
    padded = (num_tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS
    head_stride = 2 * block_size * head_size
    queries = query.reshape(-1)
    tile = np.zeros(TILE_TOKENS * stride, np.float32)
    weights = np.zeros(group * SPLIT_TOKENS, np.float32)
    tokens = np.empty(num_tokens, np.int64)  # where each token's key starts
    for token in range(num_tokens):
        slot = slots[row, first + token]
        block = np.int64(slot // block_size) * num_kv_heads + kv_head
        tokens[token] = block * head_stride + slot % block_size * head_size

    for begin in range(0, num_tokens, TILE_TOKENS):
        count = min(TILE_TOKENS, num_tokens - begin)
        _widen_listed(elements, tokens, begin, count, 0, head_size, tile, stride)
        for member in range(group):
            line = ((row * num_heads) + kv_head * group + member) * stride
            dot_tile(queries, line, tile, stride, scale, weights, member * SPLIT_TOKENS + begin)

    for member in range(group):
        line = weights[member * SPLIT_TOKENS : member * SPLIT_TOKENS + padded]
        highest = _largest(line[:num_tokens])
        total = np.float32(0)
        for token in range(num_tokens):
            line[token] = _exp(line[token] - highest)
            total += line[token]
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
        _widen_listed(elements, tokens, begin, count, values, head_size, tile, stride)
        for member in range(group):
            line = ((row * num_heads + kv_head * group + member) * num_splits + split) * stride
            add_tile(sums, line, weights, member * SPLIT_TOKENS + begin, tile, stride)


@njit(fastmath=FAST_MATH)
def _widen_listed(elements, tokens, begin, count, shift, head_size, tile, stride):
    """Fill a tile with `count` tokens of a list, and ask for the cache lines of the next ones."""
    for token in range(begin + count, min(begin + 2 * count, len(tokens))):
        prefetch_run(elements, tokens[token] + shift, head_size)
    for token in range(count):
        source = tokens[begin + token] + shift
        widen(elements, source, head_size, tile, token * stride)


@njit(fastmath=FAST_MATH | {"nnan"})
def _largest(numbers):
    largest = numbers[0]
    for number in numbers:
        largest = number if number > largest else largest
    return largest


_LOG2_E = np.float32(1.4426950408889634)
# 2 ** f for |f| <= 1/2: Taylor coefficients ln(2) ** n / n!, error below 2e-7.
_C1, _C2, _C3 = np.float32(0.6931471806), np.float32(0.2402265070), np.float32(0.0555041087)
_C4, _C5, _C6 = np.float32(0.0096181291), np.float32(0.0013333558), np.float32(0.0001540353)


@njit(fastmath=FAST_MATH)
def _exp(x):
    """exp(x) of an fp32 number <= 0; a polynomial, because LLVM cannot vectorise the C library's."""
    y = x * _LOG2_E
    y = y if y > np.float32(-126) else np.float32(-126)
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    series = _C3 + f * (_C4 + f * (_C5 + f * _C6))
    series = np.float32(1) + f * (_C1 + f * (_C2 + f * series))
    return series * np.uint32(np.uint32(np.int32(whole) + 127) << np.uint32(23)).view(np.float32)


@njit(fastmath=FAST_MATH)
def _combine(maxima, totals, weighted, row, head, num_splits, out):
    """Weigh the splits of one head against each other; no split at all gives zeros."""
    target = out[row, head]
    target[:] = 0
    if num_splits == 0:
        return
    highest = _largest(maxima[row, head, :num_splits])
    total = np.float32(0)
    for split in range(num_splits):
        total += totals[row, head, split] * _exp(maxima[row, head, split] - highest)
    for split in range(num_splits):
        share = _exp(maxima[row, head, split] - highest) / total
        part = weighted[row, head, split]
        for i in range(len(target)):
            target[i] += share * part[i]
