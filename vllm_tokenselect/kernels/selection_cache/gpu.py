"""Selection Cache on a GPU: what is reused is decided on the device, before anything is scored.

`decide_rows` runs before the scores and tells the kernels behind it which rows to leave out;
`finish_rows` runs behind them. Both work through the rows of a request in order of position and keep in
registers what one row leaves to the next, so that no program reads what another has written.

Counting what the rows did is one more program of `finish_rows`: it costs no launch.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.block_table.gpu_write import write_range
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.selection_cache import state as cache_state
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

ENTRIES_PER_PROGRAM = 512  # of a line of the sparse block table
ROWS_PER_STEP = 512
SELECTS = tl.constexpr(cache_state.SELECTS)
RESELECTED = tl.constexpr(Counter.RESELECTED.value)
REUSED = tl.constexpr(Counter.REUSED.value)
SHARED = tl.constexpr(Counter.SHARED.value)
DENSE = tl.constexpr(Counter.DENSE.value)
ATTENDED = tl.constexpr(Counter.ATTENDED.value)
CONTEXT = tl.constexpr(Counter.CONTEXT.value)
# A kernel is compiled once, not again for every number that 16 happens to divide.
NUMBERS = ["n_init", "refresh_interval", "num_rows", "followers"]
ROW_ARRAYS = ["query_start", "chains", "row_seq", "row_seats", "query_len", "top_k"]
END_ARRAYS = ["candidate_ends", "context_ends", "scored_ends", "table_ends", "reused_ends"]


@dataclass(frozen=True)
class RowArrays:
    """Rows of a step, as the kernels of the Selection Cache take them.

    Attributes:
        row_seq: int32 [R], the row's request.
        query_len: int32 [R]; 0 for a padded row.
        top_k: int32 [R], candidates that the row selects; one with no more candidates neither reuses a
            selection nor becomes the last. Where rows of a chain select, its last one does.
        seat: int32 [R], of the row's request; -1 for a padded row and where there is no request: it does
            not count.
        cached_seat: int32 [R], the same of a row that takes part; -1 of any other.
        candidate_end: int32 [R], `a - n_local`.
        context_end: int32 [R], `b`; 0 for a padded row.
        scored_end: int32 [R], where the candidates end that are scored: `candidate_end` of a row that
            selects, `n_init` of any other.
        table_end: int32 [R], `context_end`, or 0 for a row that reuses a selection.
        reused_end: int32 [R], where the candidates of the reused selection ended; -1 for a row that
            reuses none.
        chains: int32 [chains, 4], the rows that take part: each run of rows of one request is a line: first
            row, number of rows, seat, owner of the seat. Such rows have one query each, and no two chains
            have one seat. A chain without rows is left out.

    Every layer writes `scored_end`, `table_end` and `reused_end` of the rows of chains anew.
    """

    row_seq: torch.Tensor
    query_len: torch.Tensor
    top_k: torch.Tensor
    seat: torch.Tensor
    cached_seat: torch.Tensor
    candidate_end: torch.Tensor
    context_end: torch.Tensor
    scored_end: torch.Tensor
    table_end: torch.Tensor
    reused_end: torch.Tensor
    chains: torch.Tensor


def decide_rows(
    query: torch.Tensor,
    num_kv_heads: int,
    query_start: torch.Tensor,
    rows: RowArrays,
    n_init: int,
    threshold: float,
    refresh_interval: int,
    state: SelectionCacheState,
) -> None:
    """As `reference.decide`; writes what the scores and the table have to do for each row of a chain.

    Args:
        query: [T, Hq, D] in the dtype of the state's, the last dimension contiguous.
    """
    num_heads, head_size = query.shape[1:]
    num_chains = len(rows.chains)
    if not num_chains:
        return
    group_size = num_heads * head_size // num_kv_heads
    padded_size, padded_groups = map(triton.next_power_of_2, (group_size, num_kv_heads))
    _decide[(num_chains,)](
        query,
        query_start,
        rows.chains,
        rows.top_k,
        rows.candidate_end,
        rows.context_end,
        state.query,
        state.candidate_end,
        state.owner,
        rows.scored_end,
        rows.table_end,
        rows.reused_end,
        threshold,
        refresh_interval,
        n_init,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        PADDED_KV_HEADS=padded_groups,
        PADDED_SIZE=padded_size,
        num_warps=8 if padded_groups * padded_size > 2048 else 4,
    )


def finish_rows(
    rows: RowArrays,
    block_table: torch.Tensor,
    n_init: int,
    block_size: int,
    state: SelectionCacheState | None,
    table: SparseBlockTable,
    counters: torch.Tensor,
    followers: int = 0,
) -> None:
    """As `reference.finish` and `reference.count_rows`.

    Args:
        rows: as `decide_rows` left them.
        state: `selected` is read and written. None where there is no Selection Cache: rows are counted.
        table: completed.
        counters: int64 [len(Counter)], added to.
        followers: as `reference.count_rows` takes it.
    """
    num_rows, slots = len(rows.row_seq), table.slots
    if not num_rows:
        return
    num_chains = 0 if state is None else len(rows.chains)
    selected = slots if state is None else state.selected  # not read without chains
    pieces = triton.cdiv(selected.shape[1], ENTRIES_PER_PROGRAM) if num_chains else 1
    _finish[(pieces, num_chains + 1)](
        rows.seat,
        rows.query_len,
        rows.top_k,
        rows.candidate_end,
        rows.context_end,
        rows.scored_end,
        rows.reused_end,
        counters,
        rows.chains,
        block_table,
        rows.row_seq,
        selected,
        slots,
        table.lengths,
        num_rows,
        n_init,
        followers,
        block_table.stride(0),
        selected.stride(0),
        slots.stride(0),
        BLOCK_SIZE=block_size,
        ENTRIES=ENTRIES_PER_PROGRAM,
        ROWS=ROWS_PER_STEP,
        num_warps=4,
    )


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS + END_ARRAYS)
def _decide(
    query,
    query_start,
    chains,
    top_k,
    candidate_ends,
    context_ends,
    state_query,
    state_end,
    state_owner,
    scored_ends,
    table_ends,
    reused_ends,
    threshold,
    refresh_interval,
    n_init,
    token_stride,
    head_stride,
    HEAD_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """The rows of a chain, one after the other: as `reference.decide`.

    With `q` a row's query and `l` that of the last selection, heads that share a KV head as one vector,
    a row reuses the selection if in every KV head `q . l >= threshold |q| |l|`.
    """
    chain = chains + tl.program_id(0) * 4
    first = tl.load(chain).to(tl.int64)
    num_rows = tl.load(chain + 1)
    if num_rows == 0:
        return
    seat = tl.load(chain + 2).to(tl.int64)
    owner = tl.load(chain + 3)
    group, in_group = tl.arange(0, PADDED_KV_HEADS)[:, None], tl.arange(0, PADDED_SIZE)[None, :]
    is_element = (group < KV_HEADS) & (in_group < GROUP_SIZE)
    element = group * GROUP_SIZE + in_group
    source = query + (element // HEAD_SIZE) * head_stride + element % HEAD_SIZE
    stored = state_query + seat * KV_HEADS * GROUP_SIZE + element
    # [PADDED_KV_HEADS, PADDED_SIZE]
    last = tl.load(stored, is_element, 0.0).to(tl.float32)
    last_square = tl.sum(last * last, 1)
    last_end = tl.load(state_end + seat)
    known = tl.load(state_owner + seat) == owner
    changed = False
    for following in range(0, num_rows):
        row = first + following
        candidate_end = tl.load(candidate_ends + row)
        start = tl.load(query_start + row).to(tl.int64)
        # [PADDED_KV_HEADS, PADDED_SIZE]
        own = tl.load(source + start * token_stride, is_element, 0.0).to(tl.float32)
        own_square = tl.sum(own * own, 1)
        least = threshold * tl.sqrt(own_square) * tl.sqrt(last_square)
        resembles = tl.sum(own * last, 1) >= least  # never where there is a NaN
        similar = tl.sum(resembles.to(tl.int32), 0) == PADDED_KV_HEADS
        recent = candidate_end - last_end <= refresh_interval
        sparse = candidate_end - n_init > tl.load(top_k + row)
        reuses = sparse & known & similar & recent
        selects = sparse & (reuses == 0)
        tl.store(scored_ends + row, tl.where(selects, candidate_end, n_init))
        tl.store(table_ends + row, tl.where(reuses, 0, tl.load(context_ends + row)))
        tl.store(reused_ends + row, tl.where(reuses, last_end, SELECTS))
        last = tl.where(selects, own, last)
        last_square = tl.where(selects, own_square, last_square)
        last_end = tl.where(selects, candidate_end, last_end)
        known = known | selects
        changed = changed | selects
    if changed:
        # [PADDED_KV_HEADS, PADDED_SIZE]
        tl.store(stored, last.to(state_query.dtype.element_ty), is_element)
        tl.store(state_end + seat, last_end)
        tl.store(state_owner + seat, owner)


@triton.jit
def add_counts(
    row_seats,
    query_len,
    top_k,
    candidate_ends,
    context_ends,
    scored_ends,
    reused_ends,
    counters,
    num_rows,
    n_init,
    followers,
    ROWS: tl.constexpr,
):
    """Count all rows of a group: `reference.count_rows`, with lengths as they follow from the rows."""
    layers = 1 + followers.to(tl.int64)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        # [ROWS], and so is all that is loaded below
        counts = tl.load(row_seats + row, row < num_rows, -1) >= 0
        reused_end = tl.load(reused_ends + row, counts, SELECTS).to(tl.int64)
        reuses = counts & (reused_end != SELECTS)
        selects = counts & (tl.load(scored_ends + row, counts, n_init) > n_init)
        dense = counts & (reuses == 0) & (selects == 0)
        context_end = tl.load(context_ends + row, counts, 0).to(tl.int64)
        candidate_end = tl.load(candidate_ends + row, counts, 0).to(tl.int64)
        local_start = tl.where(reuses, reused_end, candidate_end)
        selected = n_init + tl.load(top_k + row, counts, 0).to(tl.int64)
        length = tl.where(dense, context_end, selected + context_end - local_start)
        queries = tl.load(query_len + row, counts, 0).to(tl.int64)
        # The last query sees all entries, the one before it all but the last.
        hidden = queries * (queries - 1) // 2
        attended = tl.where(counts, queries * length - hidden, 0)
        context = tl.where(counts, queries * context_end - hidden, 0)
        tl.atomic_add(counters + RESELECTED, tl.sum(selects.to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(counters + REUSED, tl.sum(reuses.to(tl.int64), 0), sem="relaxed")
        shared = (selects | reuses).to(tl.int64) * followers
        tl.atomic_add(counters + SHARED, tl.sum(shared, 0), sem="relaxed")
        tl.atomic_add(counters + DENSE, tl.sum(dense.to(tl.int64), 0) * layers, sem="relaxed")
        tl.atomic_add(counters + ATTENDED, tl.sum(attended, 0) * layers, sem="relaxed")
        tl.atomic_add(counters + CONTEXT, tl.sum(context, 0) * layers, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS + END_ARRAYS)
def _finish(
    row_seats,
    query_len,
    top_k,
    candidate_ends,
    context_ends,
    scored_ends,
    reused_ends,
    counters,
    chains,
    block_table,
    row_seq,
    state_selected,
    slots,
    lengths,
    num_rows,
    n_init,
    followers,
    table_stride,
    selected_stride,
    slots_stride,
    BLOCK_SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One piece of the line, for all rows of a chain: as `reference.finish`.

    Behind the last chain, the counting: as `reference.count_rows`.
    """
    piece, which = tl.program_id(0), tl.program_id(1)
    if which == tl.num_programs(1) - 1:
        if piece == 0:
            add_counts(
                row_seats,
                query_len,
                top_k,
                candidate_ends,
                context_ends,
                scored_ends,
                reused_ends,
                counters,
                num_rows,
                n_init,
                followers,
                ROWS,
            )
        return
    first = tl.load(chains + which * 4).to(tl.int64)
    chain_rows = tl.load(chains + which * 4 + 1)
    if chain_rows == 0:
        return
    # The first rows of a chain may be too short to select. Where all are, nothing is kept or read.
    size = n_init + tl.load(top_k + first + chain_rows - 1)
    if size > selected_stride:
        return
    entry = piece * ENTRIES + tl.arange(0, ENTRIES)
    in_line = entry < size
    stored = state_selected + tl.load(chains + which * 4 + 2).to(tl.int64) * selected_stride + entry
    # [ENTRIES]
    kept = tl.load(stored, in_line, 0)
    changed = False
    for following in range(0, chain_rows):
        row = first + following
        line = slots + row * slots_stride
        reused_end = tl.load(reused_ends + row)
        selects = tl.load(scored_ends + row) > n_init
        # [ENTRIES]
        own = tl.load(line + entry, entry < tl.where(selects, size, 0), 0)
        kept = tl.where(selects, own, kept)
        changed = changed | selects
        if reused_end != SELECTS:
            # [ENTRIES]
            tl.store(line + entry, kept, in_line)
            if piece == 0:
                context_end = tl.load(context_ends + row)
                blocks = block_table + tl.load(row_seq + row).to(tl.int64) * table_stride
                write_range(blocks, reused_end, context_end, size, line, BLOCK_SIZE, ENTRIES)
                tl.store(lengths + row, size + context_end - reused_end)
    if changed:
        # [ENTRIES]
        tl.store(stored, kept, in_line)
