"""Readable definition of the Selection Cache (TokenSelect, arXiv 2411.02886, section 3.4).

A request's generated tokens are decided one after the other, also when one step computes many of them
again after a preemption: so they are decided as they were the first time.
"""

from __future__ import annotations

import torch

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.selection_cache.state import SELECTS, SelectionCacheState


def decide(
    query: torch.Tensor,
    num_kv_heads: int,
    query_start: torch.Tensor,
    caches: torch.Tensor,
    seat: torch.Tensor,
    owner: torch.Tensor,
    candidate_ends: torch.Tensor,
    threshold: float,
    refresh_interval: int,
    state: SelectionCacheState,
) -> torch.Tensor:
    """Which rows reuse their request's last selection; the others that take part become the last.

    A row reuses a selection when the line of its seat is its owner's, when its query and that of the
    selection have a cosine of at least `threshold` in every KV head (the query heads that read it as
    one vector), and when the end of its candidates has moved by no more than `refresh_interval` tokens
    since. Vectors of length zero resemble everything, those with a NaN nothing.

    Args:
        query: fp32, bf16 or fp16 [T, Hq, D].
        num_kv_heads: Hkv.
        query_start: int32 [R], first query of each row; a row that takes part has no other.
        caches: bool [R], the row takes part: a generated token that selects unless it reuses.
        seat: int32 [R], line of the state; read where the row takes part.
        owner: int32 [R], never 0 where the row takes part.
        candidate_ends: int32 [R].
        threshold: least cosine.
        refresh_interval: most tokens that may have left the local window.
        state: its `query`, `candidate_end` and `owner` are written for rows that select.

    Returns:
        int32 [R], where the candidates of the reused selection ended; `SELECTS` where none is reused.
    """
    reused_ends = torch.full_like(candidate_ends, SELECTS)
    for row in caches.nonzero()[:, 0].tolist():
        line, end = int(seat[row]), int(candidate_ends[row])
        own, stored = query[query_start[row]], state.query[line]
        last_end = int(state.candidate_end[line])
        known = int(state.owner[line]) == int(owner[row])
        if (
            known
            and end - last_end <= refresh_interval
            and _similar(own, stored, num_kv_heads, threshold)
        ):
            reused_ends[row] = last_end
        else:
            state.query[line] = own
            state.candidate_end[line] = end
            state.owner[line] = owner[row]
    return reused_ends


def finish(
    reused_ends: torch.Tensor,
    caches: torch.Tensor,
    seat: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    n_init: int,
    top_k: torch.Tensor,
    context_ends: torch.Tensor,
    block_size: int,
    state: SelectionCacheState,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Complete the sparse block table by the rows that reuse a selection; remember the others'.

    A reused selection is the sink and what was selected, then everything from where the candidates
    ended at that time. So no token is invisible because a selection is old.

    Args:
        reused_ends: int32 [R], what `decide` said.
        caches, seat: as given to `decide`.
        block_table: int32 [S, W], KV blocks of each request.
        row_seq: int32 [R], the line of `block_table` that a row reads.
        n_init: length of the sink.
        top_k: int32 [R], candidates that were selected, the same for all rows of an owner.
        context_ends: int32 [R], end of the row's own tokens (exclusive).
        block_size: tokens of a KV block.
        state: its `selected` is written for rows that take part and select.
        slots: int32 [R, width], sparse block table; complete but for rows that reuse.
        lengths: int32 [R], entries of each row; as `slots`.
    """
    for row in caches.nonzero()[:, 0].tolist():
        line, size, end = int(seat[row]), n_init + int(top_k[row]), int(reused_ends[row])
        if end == SELECTS:
            state.selected[line, :size] = slots[row, :size]
            continue
        local = torch.arange(end, int(context_ends[row]), device=slots.device)
        blocks = block_table[row_seq[row], local // block_size]
        slots[row, :size] = state.selected[line, :size]
        slots[row, size : size + len(local)] = blocks * block_size + local % block_size
        lengths[row] = size + len(local)


def count_rows(
    seat: torch.Tensor,
    query_len: torch.Tensor,
    selects: torch.Tensor,
    reused_ends: torch.Tensor,
    context_ends: torch.Tensor,
    lengths: torch.Tensor,
    counters: torch.Tensor,
    followers: int = 0,
) -> None:
    """Add the rows of requests, and what their queries attend to, to counters.

    Args:
        seat: int32 [R]; a row with -1 is no request's and does not count.
        query_len: int32 [R], queries of each row; the last of them sees all of the row's entries.
        selects: bool [R], the row was selected anew.
        reused_ends: int32 [R], what `decide` said.
        context_ends: int32 [R], end of the row's own tokens (exclusive).
        lengths: int32 [R], entries of each row of the sparse block table.
        counters: int64 [len(Counter)], added to.
        followers: how many layers attend to the same entries, and are counted here too: rows that select or
            reuse a selection share it there.
    """
    layers = 1 + followers
    counts = seat >= 0
    reuses = reused_ends != SELECTS
    counters[Counter.RESELECTED] += (selects & counts).sum()
    counters[Counter.REUSED] += (reuses & counts).sum()
    counters[Counter.SHARED] += followers * ((selects | reuses) & counts).sum()
    counters[Counter.DENSE] += layers * (~selects & ~reuses & counts).sum()
    queries = query_len.long()
    for counter, ends in ((Counter.ATTENDED, lengths), (Counter.CONTEXT, context_ends)):
        seen = queries * (ends.long() - queries) + queries * (queries + 1) // 2
        counters[counter] += layers * seen[counts].sum()


def _similar(
    query: torch.Tensor, stored: torch.Tensor, num_kv_heads: int, threshold: float
) -> bool:
    own, last = (x.float().view(num_kv_heads, -1) for x in (query, stored))
    products = (own * last).sum(dim=1)
    return bool((products >= threshold * own.norm(dim=1) * last.norm(dim=1)).all())
