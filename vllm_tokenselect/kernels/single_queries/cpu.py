"""A layer's work for rows of one query on a CPU, in one call of compiled code.

In decoding a layer takes a fraction of a millisecond; five calls from Python would be a third of it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit

from vllm_tokenselect.kernels.attend.cpu import attend_rows
from vllm_tokenselect.kernels.block_table.cpu import build_rows
from vllm_tokenselect.kernels.cpu_arrays import (
    cache_elements,
    int32_array,
    rotation_table,
    token_elements,
)
from vllm_tokenselect.kernels.cpu_tiles import LANES, rotate_run, widen
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
    uses_state = _caching_arrays(rows.caching, len(ends))

    def layer(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        state: SelectionCacheState | None,
        rotation: Rotation | None,
    ) -> None:
        in_place = out.is_contiguous()
        attended = out if in_place else torch.empty_like(out, memory_format=torch.contiguous_format)
        _single_queries(
            *token_elements(query),
            query_index,
            cache_elements(kv_cache),
            *table,
            rows.selects,
            np.float32(scale),
            query.shape[1],
            kv_cache.shape[1],
            kv_cache.shape[4],
            *uses_state,
            *_state_arrays(state, query),
            rotation_table(None if rotation is None else rotation.vote[None]),
            rotation_table(None if rotation is None else rotation.cos_sin),
            cache_elements(attended),
        )
        if not in_place:
            index = rows.query_index.long()
            out[index] = attended[index]

    return layer


def _caching_arrays(caching: CachingRows | None, num_rows: int) -> tuple[Any, ...]:
    if caching is None:
        none = np.zeros(num_rows, np.int32)
        return np.zeros(num_rows, np.bool_), none, none, np.float32(1), 0, np.zeros(5, np.int64)
    return (
        caching.caches.numpy(),
        int32_array(caching.slot),
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


@njit(cache=True)
def _single_queries(
    queries,
    query_distance,
    query_index,
    elements,
    block_table,
    row_seq,
    n_init,
    top_k,
    candidate_ends,
    context_ends,
    block_size,
    slots,
    lengths,
    selects,
    scale,
    num_heads,
    num_kv_heads,
    head_size,
    caches,
    slot,
    owner,
    threshold,
    refresh_interval,
    counts,
    stored_queries,
    stored_selections,
    stored_ends,
    stored_owners,
    vote_turn,
    cos_sin,
    out,
):
    if selects:
        reused_end = np.empty(len(query_index), np.int32)
        decide_rows(
            queries,
            query_distance,
            query_index,
            num_heads * head_size,
            num_kv_heads,
            caches,
            slot,
            owner,
            candidate_ends,
            threshold,
            refresh_interval,
            stored_queries,
            stored_ends,
            stored_owners,
            reused_end,
        )
        rows = np.flatnonzero(reused_end == SELECTS)
        if len(rows) > 0:
            _select_rows(
                rows,
                queries,
                query_distance,
                query_index,
                elements,
                block_table,
                row_seq,
                n_init,
                top_k,
                candidate_ends,
                context_ends,
                block_size,
                slots,
                lengths,
                scale,
                num_heads,
                num_kv_heads,
                head_size,
                vote_turn,
            )
        finish_rows(
            caches,
            reused_end,
            slot,
            block_table,
            row_seq,
            n_init,
            top_k,
            context_ends,
            block_size,
            slots,
            lengths,
            stored_selections,
            counts,
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
        cos_sin,
        out,
    )


@njit
def _select_rows(
    rows,
    queries,
    query_distance,
    query_index,
    elements,
    block_table,
    row_seq,
    n_init,
    top_k,
    candidate_ends,
    context_ends,
    block_size,
    slots,
    lengths,
    scale,
    num_heads,
    num_kv_heads,
    head_size,
    vote_turn,
):
    """Score, vote and build the table for some of the rows."""
    ends = candidate_ends[rows]
    width = ends.max() - n_init
    stride = (head_size + LANES - 1) // LANES * LANES
    padded = np.zeros((len(rows), num_heads, stride), np.float32)
    flat = padded.reshape(-1)
    for line in range(len(rows) * num_heads):
        source = query_index[rows[line // num_heads]] * query_distance
        source += line % num_heads * head_size
        widen(queries, source, head_size, flat, line * stride)
        if vote_turn.shape[1] > 0:
            rotate_run(flat, line * stride, vote_turn, 0)
    logits = np.empty((len(rows), num_heads, width), np.float32)
    votes = np.empty((len(rows), width), np.float32)
    score_rows(
        padded,
        elements,
        block_table,
        row_seq[rows],
        n_init,
        ends,
        scale,
        num_kv_heads,
        block_size,
        head_size,
        logits,
    )
    vote_rows(logits, votes)
    build_rows(
        rows,
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
