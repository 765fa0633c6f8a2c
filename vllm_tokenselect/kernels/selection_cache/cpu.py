"""The Selection Cache on a CPU.

What is reused is decided before anything is scored: rows that reuse a selection are neither scored, nor
voted on, nor selected.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import math

import numpy as np
from numba import njit

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.block_table.cpu import write_range
from vllm_tokenselect.kernels.cpu_tiles import widen
from vllm_tokenselect.kernels.cpu_vectors import dot
from vllm_tokenselect.kernels.selection_cache.state import SELECTS


@njit
def decide_rows(
    queries,
    query_distance,
    query_index,
    query_size,
    num_kv_heads,
    caches,
    seat,
    owner,
    candidate_ends,
    threshold,
    refresh_interval,
    stored_queries,
    stored_ends,
    stored_owners,
    reused_end,
):
    """As `reference.decide`: rows of one request in order, each compared with the last selection."""
    own = np.empty(query_size, np.float32)
    stored = np.empty(query_size, np.float32)
    for row in range(len(query_index)):
        reused_end[row] = SELECTS
        if not caches[row]:
            continue
        line, end = seat[row], candidate_ends[row]
        source = query_index[row] * query_distance
        if stored_owners[line] == owner[row] and end - stored_ends[line] <= refresh_interval:
            widen(queries, source, query_size, own, 0)  # [Hq, D]
            widen(stored_queries, line * query_size, query_size, stored, 0)  # [Hq, D]
            if _similar(own, stored, num_kv_heads, threshold):
                reused_end[row] = stored_ends[line]
                continue
        for i in range(query_size):
            stored_queries[line * query_size + i] = queries[source + i]
        stored_ends[line] = end
        stored_owners[line] = owner[row]


@njit
def _similar(query, stored, num_kv_heads, threshold):
    """Whether `q . s >= threshold * |q| * |s|` in every KV head, of the queries [G, D] that read it."""
    size = len(query) // num_kv_heads
    for first in range(0, len(query), size):
        own_square = dot(query, query, first, first + size)
        stored_square = dot(stored, stored, first, first + size)
        least = threshold * math.sqrt(own_square) * math.sqrt(stored_square)
        if not dot(query, stored, first, first + size) >= least:  # a NaN resembles nothing
            return False
    return True


@njit
def finish_rows(
    caches,
    reused_end,
    seat,
    block_table,
    row_seq,
    n_init,
    top_k,
    context_ends,
    block_size,
    slots,
    lengths,
    selected,
    followers,
    counts,
):
    """As `reference.finish`; also counts the rows that take part, for the layers that follow too."""
    for row in range(len(seat)):
        if not caches[row]:
            continue
        line, size = seat[row], n_init + top_k[row]
        end, context_end = reused_end[row], context_ends[row]
        if end == SELECTS:
            selected[line, :size] = slots[row, :size]
        else:
            slots[row, :size] = selected[line, :size]
            write_range(block_table, row_seq[row], end, context_end, block_size, slots, row, size)
            lengths[row] = size + context_end - end
        counts[Counter.RESELECTED.value if end == SELECTS else Counter.REUSED.value] += 1
        counts[Counter.SHARED.value] += followers
        counts[Counter.ATTENDED.value] += (1 + followers) * lengths[row]
        counts[Counter.CONTEXT.value] += (1 + followers) * context_end
