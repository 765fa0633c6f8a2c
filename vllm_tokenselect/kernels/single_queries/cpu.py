"""A layer's work for rows of one query on a CPU, in one call of compiled code.

In decoding a layer takes a fraction of a millisecond; five calls from Python would be a third of it.
Where processes vote together they are two, one before the votes are added up and one behind.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads

from vllm_tokenselect.kernels.attend.cpu import attend_rows
from vllm_tokenselect.kernels.block_table.cpu import build_rows
from vllm_tokenselect.kernels.cpu_arrays import (
    cache_elements,
    int32_array,
    rotation_table,
    sink_logits,
    token_elements,
)
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import rotate_run
from vllm_tokenselect.kernels.cpu_tiles import widen
from vllm_tokenselect.kernels.cpu_vectors import LANES
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.score.cpu import score_rows
from vllm_tokenselect.kernels.selection_cache.cpu import decide_rows, finish_rows
from vllm_tokenselect.kernels.selection_cache.state import SELECTS, SelectionCacheState
from vllm_tokenselect.kernels.single_queries.rows import CachingRows, Layer, SingleQueryRows
from vllm_tokenselect.kernels.vote.cpu import vote_rows


def single_queries(rows: SingleQueryRows) -> Layer:
    """As `reference.single_queries`; `slots` and `lengths` are contiguous int32."""
    # Starts numba's threads where nothing has yet: a kernel that calls parallel ones and comes from
    # numba's cache does not do so itself, and would crash.
    get_num_threads()
    query_index, ends = int32_array(rows.query_index), int32_array(rows.candidate_ends)
    table = (
        int32_array(rows.block_table),
        int32_array(rows.row_seq),
        rows.n_init,
        int32_array(rows.top_k),
        ends,
        int32_array(rows.context_ends),
        rows.block_size,
        rows.slots.numpy(),
        rows.lengths.numpy(),
    )
    caching = _caching_arrays(rows.caching, len(ends))
    heads = rows.heads if rows.selects else None
    # Nothing is compared where no row takes part in the Selection Cache.
    compares_all_heads = heads is not None and caching[0].any()
    index = rows.query_index.long()

    def layer(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        state: SelectionCacheState | None,
        rotation: Rotation | None,
        sinks: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        in_place = out.is_contiguous()
        attended = out if in_place else torch.empty_like(out, memory_format=torch.contiguous_format)
        asking = (*token_elements(query), query_index)
        cache = (cache_elements(kv_cache), kv_cache.shape[1], kv_cache.shape[4])
        scoring = (query.shape[1], np.float32(scale))
        stored = _state_arrays(state, query)
        vote_turn = rotation_table(None if rotation is None else rotation.vote[None])
        cos_sin = rotation_table(None if rotation is None else rotation.cos_sin)
        softmax = (sink_logits(sinks), np.float32(soft_cap))
        deciding = (*asking, query.shape[1] * kv_cache.shape[4], kv_cache.shape[1])
        if heads is not None and compares_all_heads:
            deciding = _of_all_heads(heads, query[index])
        before = (asking, deciding, cache, table, scoring, caching, stored, vote_turn)
        if heads is None:
            _single_queries(rows.selects, *before, cos_sin, softmax, cache_elements(attended))
        else:
            selecting, reused_end, votes = _vote(*before)
            if len(selecting):
                votes = heads.sum_votes(torch.from_numpy(votes)).numpy()
            _select(selecting, reused_end, votes, table, caching, stored)
            _attend(asking, cache, table, scoring, cos_sin, softmax, cache_elements(attended))
        if not in_place:
            out[index] = attended[index]

    return layer


def _of_all_heads(heads: HeadGroup, query: torch.Tensor) -> tuple[Any, ...]:
    """What the Selection Cache compares: the rows' queries [R, Hq, D] of every process's heads."""
    gathered = heads.gather_heads(query)
    index = np.arange(len(gathered), dtype=np.int32)
    return *token_elements(gathered), index, gathered[0].numel(), heads.num_kv_heads


def _caching_arrays(caching: CachingRows | None, num_rows: int) -> tuple[Any, ...]:
    if caching is None:
        none = np.zeros(num_rows, np.int32)
        return np.zeros(num_rows, np.bool_), none, none, np.float32(1), 0, np.zeros(5, np.int64)
    return (
        caching.caches.numpy(),
        int32_array(caching.seat),
        int32_array(caching.owner),
        np.float32(caching.similarity_threshold),
        caching.refresh_interval,
        caching.counts.numpy(),
    )


def _state_arrays(state: SelectionCacheState | None, query: torch.Tensor) -> tuple[Any, ...]:
    if state is None:
        none = np.zeros(0, np.int32)
        return cache_elements(query.new_empty(0)), np.zeros((0, 0), np.int32), none, none
    return (
        cache_elements(state.query),
        state.selected.numpy(),
        state.candidate_end.numpy(),
        state.owner.numpy(),
    )


@compile_once()
def _single_queries(
    selects,
    asking,
    deciding,
    cache,
    table,
    scoring,
    caching,
    stored,
    vote_turn,
    cos_sin,
    softmax,
    out,
):
    if selects:
        selecting, reused_end, votes = _vote(
            asking, deciding, cache, table, scoring, caching, stored, vote_turn
        )
        _select(selecting, reused_end, votes, table, caching, stored)
    _attend(asking, cache, table, scoring, cos_sin, softmax, out)


@compile_once()
def _vote(asking, deciding, cache, table, scoring, caching, stored, vote_turn):
    """Which rows select, where the candidates of the others' selections ended, and the former's votes."""
    queries, query_distance, query_index = asking
    deciding_queries, deciding_distance, deciding_index, deciding_size, all_kv_heads = deciding
    elements, num_kv_heads, head_size = cache
    block_table, row_seq, n_init, _, candidate_ends, _, block_size, _, _ = table
    num_heads, scale = scoring
    caches, seat, owner, threshold, refresh_interval, _ = caching
    stored_queries, _, stored_ends, stored_owners = stored
    reused_end = np.empty(len(query_index), np.int32)
    decide_rows(
        deciding_queries,
        deciding_distance,
        deciding_index,
        deciding_size,
        all_kv_heads,
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
    )
    selecting = np.flatnonzero(reused_end == SELECTS)
    if len(selecting) == 0:
        return selecting, reused_end, np.empty((0, 0), np.float32)
    ends = candidate_ends[selecting]
    width = ends.max() - n_init
    stride = (head_size + LANES - 1) // LANES * LANES
    padded = np.zeros((len(selecting), num_heads, stride), np.float32)
    flat = padded.reshape(-1)
    for line in range(len(selecting) * num_heads):
        source = query_index[selecting[line // num_heads]] * query_distance
        source += line % num_heads * head_size
        widen(queries, source, head_size, flat, line * stride)
        if vote_turn.shape[1] > 0:
            rotate_run(flat, line * stride, vote_turn, 0)
    logits = np.empty((len(selecting), num_heads, width), np.float32)
    votes = np.empty((len(selecting), width), np.float32)
    score_rows(
        padded,
        elements,
        block_table,
        row_seq[selecting],
        n_init,
        ends,
        scale,
        num_kv_heads,
        block_size,
        head_size,
        logits,
    )
    vote_rows(logits, votes)
    return selecting, reused_end, votes


@compile_once()
def _select(selecting, reused_end, votes, table, caching, stored):
    """Build the table of the rows that select, and complete it by the others."""
    block_table, row_seq, n_init, top_k, _, context_ends, block_size, slots, lengths = table
    caches, seat, _, _, _, counts = caching
    if len(selecting) > 0:
        build_rows(selecting, votes, *table)
    finish_rows(
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
        stored[1],
        counts,
    )


@compile_once()
def _attend(asking, cache, table, scoring, cos_sin, softmax, out):
    queries, query_distance, query_index = asking
    elements, num_kv_heads, head_size = cache
    _, _, _, _, _, _, block_size, slots, lengths = table
    num_heads, scale = scoring
    sinks, soft_cap = softmax
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
        cos_sin,
        sinks,
        soft_cap,
        out,
    )
