"""Selection Cache on a GPU: what is reused is decided on the device, before anything is scored.

`gpu_decide` tells the kernels behind it which rows to leave out; `finish_rows` runs behind them. Both work
through the rows of a request in order of position and keep in registers what one row leaves to the next, so
that no program reads what another has written.

Counting what the rows did is one more program of `finish_rows`: it costs no launch.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.block_table.gpu_write import write_range
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.selection_cache.gpu_decide import SELECTS
from vllm_tokenselect.kernels.selection_cache.gpu_rows import (
    END_ARRAYS,
    NUMBERS,
    ROW_ARRAYS,
    RowArrays,
)
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

ENTRIES_PER_PROGRAM = 512  # of a line of the sparse block table
ROWS_PER_STEP = 512
RESELECTED = tl.constexpr(Counter.RESELECTED.value)
REUSED = tl.constexpr(Counter.REUSED.value)
SHARED = tl.constexpr(Counter.SHARED.value)
DENSE = tl.constexpr(Counter.DENSE.value)
ATTENDED = tl.constexpr(Counter.ATTENDED.value)
CONTEXT = tl.constexpr(Counter.CONTEXT.value)


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
        rows: as they were decided.
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
        rows.cached_seat,
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
    cached_seats,
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
    first = tl.load(chains + which * 2).to(tl.int64)
    chain_rows = tl.load(chains + which * 2 + 1)
    if chain_rows == 0:
        return
    # The first rows of a chain may be too short to select. Where all are, nothing is kept or read.
    size = n_init + tl.load(top_k + first + chain_rows - 1)
    if size > selected_stride:
        return
    entry = piece * ENTRIES + tl.arange(0, ENTRIES)
    in_line = entry < size
    stored = state_selected + tl.load(cached_seats + first).to(tl.int64) * selected_stride + entry
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
