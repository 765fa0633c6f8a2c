"""One split of a row's tokens: scores, weights and weighted values for the query heads of one KV head."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_tokenselect.kernels.cpu_bf16 import (
    BF16_LANES,
    add_bf16_tile,
    dot_bf16_tile,
    holds_bf16,
    in_order,
    padded_size,
    place_tile,
)
from vllm_tokenselect.kernels.cpu_numbers import copy_run, rotate_run
from vllm_tokenselect.kernels.cpu_tiles import (
    PREFETCH_TOKENS,
    TILE_TOKENS,
    add_tile,
    dot_tile,
    prefetch_listed,
    widen,
    widen_listed,
)
from vllm_tokenselect.kernels.cpu_vectors import LANES, cap_scores, exponentials, largest

MAX_SPLIT_TOKENS = 512


@njit
def attend_split(
    queries,
    source,
    group,
    elements,
    starts,
    first,
    count,
    values,
    head_size,
    scale,
    cos_sin,
    place,
    soft_cap,
    maxima,
    totals,
    split,
    num_splits,
    weighted,
    target,
):
    """Attend to `count` tokens of a row, from its token `first` on, with the queries [G, D] at `source`.

    The keys start at `starts` of `elements`; behind the `count` ones stand the tokens to read next, or
    the last one again until a tile is full. The values start `values` behind the keys. `cos_sin`, where
    it has columns, turns keys and queries to their places among the row's tokens; the query's is `place`.

    Written are the highest score and the sum of weights of each query, at `split` and then every
    `num_splits` of `maxima` and `totals`, and the weighted sums of values [G, D] at `weighted[target:]`.
    """
    weights = np.empty(group * MAX_SPLIT_TOKENS, np.float32)
    if holds_bf16(queries) and holds_bf16(elements) and cos_sin.shape[1] == 0:
        _score_in_place(
            queries, source, group, elements, starts, count, values, head_size, scale, weights
        )
    else:
        _score_widened(
            queries,
            source,
            group,
            elements,
            starts,
            first,
            count,
            values,
            head_size,
            scale,
            cos_sin,
            place,
            weights,
        )
    padded = (count + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS
    for member in range(group):
        own = weights[member * MAX_SPLIT_TOKENS : (member + 1) * MAX_SPLIT_TOKENS]  # [tokens]
        if soft_cap > 0:
            cap_scores(own[:padded], soft_cap)
        highest = largest(own[:count])
        maxima[split + member * num_splits] = highest
        totals[split + member * num_splits] = exponentials(own[:count], highest)
        own[count:padded] = 0
    if holds_bf16(elements):
        _weigh_in_place(
            elements, starts, count, values, head_size, weights, group, weighted, target
        )
    else:
        _weigh_widened(elements, starts, count, values, head_size, weights, group, weighted, target)


@njit
def _prefetch(elements, starts, begin, count, shift, next_shift, head_size):
    """Ask for the tile `PREFETCH_TOKENS` behind `begin`: of this pass, or of the next behind `count`.

    After the keys come the values of the same tokens; after these the keys of the tokens behind them.
    """
    ahead = begin + PREFETCH_TOKENS
    if ahead < count:
        prefetch_listed(elements, starts, ahead, shift, head_size)
    elif next_shift > 0:
        prefetch_listed(
            elements, starts, (ahead - count) // TILE_TOKENS * TILE_TOKENS, next_shift, head_size
        )
    else:
        prefetch_listed(elements, starts, ahead, 0, head_size)


@njit
def _score_in_place(
    queries, source, group, elements, starts, count, values, head_size, scale, weights
):
    """Write the scores to `weights` [G, MAX_SPLIT_TOKENS], flat.

    For bf16 queries and keys: these are multiplied where they lie.
    """
    stride = padded_size(head_size)
    num_vectors = stride // BF16_LANES
    bits = np.zeros(group * stride, np.uint16)  # [G, D']
    for member in range(group):
        copy_run(queries, source + member * head_size, bits, member * stride, head_size)
    tile = np.zeros(TILE_TOKENS * stride, np.uint16)
    places = np.empty(TILE_TOKENS, np.int64)
    for begin in range(0, count, TILE_TOKENS):
        _prefetch(elements, starts, begin, count, 0, values, head_size)
        place_tile(elements, starts, begin, TILE_TOKENS, 0, head_size, tile, places)
        for member in range(group):
            target = member * MAX_SPLIT_TOKENS + begin
            # [D'] . [tokens, D'] -> [tokens]
            dot_bf16_tile(bits, member * stride, places, num_vectors, scale, weights, target)


@njit
def _score_widened(
    queries,
    source,
    group,
    elements,
    starts,
    first,
    count,
    values,
    head_size,
    scale,
    cos_sin,
    place,
    weights,
):
    """Write the scores to `weights` [G, MAX_SPLIT_TOKENS], flat."""
    stride = (head_size + LANES - 1) // LANES * LANES
    is_rotated = cos_sin.shape[1] > 0
    padded = np.zeros(group * stride, np.float32)  # [G, D']
    for member in range(group):
        widen(queries, source + member * head_size, head_size, padded, member * stride)
        if is_rotated:
            rotate_run(padded, member * stride, cos_sin, place)
    tile = np.zeros(TILE_TOKENS * stride, np.float32)  # [tokens, D']
    for begin in range(0, count, TILE_TOKENS):
        in_tile = min(TILE_TOKENS, count - begin)
        _prefetch(elements, starts, begin, count, 0, values, head_size)
        widen_listed(elements, starts, begin, in_tile, 0, head_size, tile, stride)
        if is_rotated:
            for token in range(in_tile):
                rotate_run(tile, token * stride, cos_sin, first + begin + token)
        for member in range(group):
            target = member * MAX_SPLIT_TOKENS + begin
            # [D'] . [tokens, D'] -> [tokens]
            dot_tile(padded, member * stride, tile, stride, scale, weights, target)


@njit
def _weigh_in_place(elements, starts, count, values, head_size, weights, group, weighted, target):
    """Write the sums of bf16 values times `weights` [G, MAX_SPLIT_TOKENS], flat, to `weighted[target:]`."""
    stride = padded_size(head_size)
    num_vectors = stride // BF16_LANES
    sums = np.zeros(group * stride, np.float32)  # [G, D']
    tile = np.zeros(TILE_TOKENS * stride, np.uint16)
    places = np.empty(TILE_TOKENS, np.int64)
    for begin in range(0, count, TILE_TOKENS):
        in_tile = min(TILE_TOKENS, count - begin)
        _prefetch(elements, starts, begin, count, values, 0, head_size)
        # A weight of zero is multiplied too, and 0 * infinity is NaN: so zeros fill the last tile.
        place_tile(elements, starts, begin, in_tile, values, head_size, tile, places)
        for member in range(group):
            own = member * MAX_SPLIT_TOKENS + begin
            # [tokens] . [tokens, D'] -> [D']
            add_bf16_tile(sums, member * stride, weights, own, places, num_vectors)
    for member in range(group):
        in_order(sums, member * stride, weighted, target + member * head_size, head_size)


@njit
def _weigh_widened(elements, starts, count, values, head_size, weights, group, weighted, target):
    """As `_weigh_in_place`, of values of any dtype."""
    stride = (head_size + LANES - 1) // LANES * LANES
    sums = np.zeros(group * stride, np.float32)  # [G, D']
    tile = np.zeros(TILE_TOKENS * stride, np.float32)  # [tokens, D']
    for begin in range(0, count, TILE_TOKENS):
        in_tile = min(TILE_TOKENS, count - begin)
        _prefetch(elements, starts, begin, count, values, 0, head_size)
        widen_listed(elements, starts, begin, in_tile, values, head_size, tile, stride)
        tile[in_tile * stride :] = 0  # weights of zero are multiplied too, and 0 * infinity is NaN
        for member in range(group):
            own = member * MAX_SPLIT_TOKENS + begin
            # [tokens] . [tokens, D'] -> [D']
            add_tile(sums, member * stride, weights, own, tile, stride)
    for member in range(group):
        copy_run(sums, member * stride, weighted, target + member * head_size, head_size)
