"""The sparse block table of rows in the Selection Cache, completed by the launch that writes it.

Where a request has one row at most, nothing that a row leaves is read by another: a row that selects stores
its selection beside its table, a row that reuses one reads it, and the counting is a program of its own.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.block_table.gpu import RANGE_TOKENS, TableScratch, count_digits
from vllm_tokenselect.kernels.block_table.gpu_write import write_range, write_row
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.columns import Columns
from vllm_tokenselect.kernels.selection_cache.gpu import ROWS_PER_STEP, add_counts
from vllm_tokenselect.kernels.selection_cache.gpu_decide import SELECTS, Decision, remember_query
from vllm_tokenselect.kernels.selection_cache.gpu_rows import (
    END_ARRAYS,
    NUMBERS,
    ROW_ARRAYS,
    RowArrays,
)
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState


def build_finished_table(
    votes: torch.Tensor | None,
    columns: Columns,
    block_table: torch.Tensor,
    rows: RowArrays,
    n_init: int,
    block_size: int,
    table: SparseBlockTable,
    scratch: TableScratch,
    counted: bool,
    state: SelectionCacheState | None,
    counters: torch.Tensor,
    followers: int = 0,
    decision: Decision | None = None,
) -> None:
    """`build_sparse_block_table`, and `finish_rows` behind it, in as many launches as the former.

    Args:
        rows: as they were decided; of chains of one row.
        votes, columns, scratch, counted: as `build_sparse_block_table` takes them.
        state, counters, followers: as `finish_rows` takes them.
        decision: the one of the scores, if they decided: rows that select have their queries stored.
    """
    num_rows, slots, lengths = len(rows.row_seq), table.slots, table.lengths
    if not num_rows:
        return
    launch = count_digits(
        votes, columns, slots, lengths, n_init, rows.top_k, rows.scored_end, scratch, counted
    )
    parts, _ = launch.grid
    _write_finished[(parts, num_rows + 1)](
        **launch.rows,
        **launch.found,
        block_table=block_table,
        row_seq=rows.row_seq,
        row_seats=rows.seat,
        cached_seats=rows.cached_seat,
        query_len=rows.query_len,
        row_ends=rows.candidate_end,
        context_ends=rows.context_end,
        table_ends=rows.table_end,
        reused_ends=rows.reused_end,
        counters=counters,
        selected=None if state is None else state.selected,
        **_remembered(decision),
        slots=slots,
        lengths=lengths,
        followers=followers,
        table_stride=block_table.stride(0),
        selected_stride=0 if state is None else state.selected.stride(0),
        slots_stride=slots.stride(0),
        BLOCK_SIZE=block_size,
        RANGE=RANGE_TOKENS,
        ROWS=ROWS_PER_STEP,
    )


def _remembered(decision: Decision | None) -> dict[str, Any]:
    if decision is None:
        return {}
    query = "own_query", "own_start", "own_stride", "own_head_stride"
    state = "owners", "state_query", "state_end", "state_owner"
    return {
        **{name: decision.arguments[name] for name in (*query, *state)},
        "HEAD_SIZE": decision.query.shape[2],
        "QUERY_SIZE": decision.query.shape[1] * decision.query.shape[2],
    }


@triton.jit(
    do_not_specialize=NUMBERS,
    do_not_specialize_on_alignment=[
        *ROW_ARRAYS,
        *END_ARRAYS,
        "row_ends",
        "columns",
    ],
)
def _write_finished(
    votes,
    block_table,
    row_seq,
    row_seats,
    cached_seats,
    query_len,
    top_k,
    columns,
    candidate_ends,
    row_ends,
    context_ends,
    table_ends,
    reused_ends,
    mantissas,
    found,
    counters,
    selected,
    slots,
    lengths,
    n_init,
    followers,
    table_stride,
    selected_stride,
    slots_stride,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    RANGE: tl.constexpr,
    ROWS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    PARTS: tl.constexpr,
    own_query=None,
    own_start=None,
    owners=None,
    state_query=None,
    state_end=None,
    state_owner=None,
    own_stride=None,
    own_head_stride=None,
    HEAD_SIZE: tl.constexpr = None,
    QUERY_SIZE: tl.constexpr = None,
):
    """A row that selects, or sees its whole context: as `write_row`; and its selection is stored.

    So is its query, if there is one to store.

    A row that reuses a selection: as `reference.finish`. Behind the last row, the counting of all: as
    `reference.count_rows`.

    Args:
        candidate_ends: of rows that select, `n_init` of any other.
        row_ends: where the candidates of any row end.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_rows = tl.num_programs(1) - 1
    if row == num_rows:
        if part == 0:
            add_counts(
                row_seats,
                query_len,
                top_k,
                row_ends,
                context_ends,
                candidate_ends,
                reused_ends,
                counters,
                num_rows,
                n_init,
                followers,
                ROWS,
            )
        return
    line = block_table + tl.load(row_seq + row).to(tl.int64) * table_stride
    slots_line = slots + row * slots_stride
    wanted = tl.load(top_k + row)
    size = n_init + wanted
    selected_line, remembers, reused_end = slots_line, False, SELECTS
    if selected is not None:
        seat = tl.load(cached_seats + row).to(tl.int64)
        selected_line = selected + tl.maximum(seat, 0) * selected_stride
        remembers = (seat >= 0) & (size <= selected_stride)
        reused_end = tl.load(reused_ends + row)
    if reused_end == SELECTS:
        candidate_end = tl.load(candidate_ends + row)
        write_row(
            votes,
            columns,
            line,
            candidate_end,
            tl.load(table_ends + row),
            wanted,
            mantissas,
            found,
            slots_line,
            lengths,
            selected_line,
            remembers,
            n_init,
            BLOCK_SIZE,
            TOKENS,
            RANGE,
            MANTISSA_BITS,
            PARTS,
        )
        if own_query is not None and (seat >= 0) & (candidate_end > n_init):
            own = own_query + tl.load(own_start + row).to(tl.int64) * own_stride
            stored = state_query + seat * QUERY_SIZE
            shares = tl.num_programs(0)
            remember_query(own, own_head_stride, stored, part, shares, HEAD_SIZE, QUERY_SIZE)
            if part == 0:
                tl.store(state_end + seat, candidate_end)
                tl.store(state_owner + seat, tl.load(owners + row))
    else:
        for first in range(part * RANGE, size, tl.num_programs(0) * RANGE):
            entry = first + tl.arange(0, RANGE)
            # [RANGE]
            slot = tl.load(selected_line + entry, entry < size, 0)
            tl.store(slots_line + entry, slot, entry < size)
        if part == 0:
            context_end = tl.load(context_ends + row)
            write_range(line, reused_end, context_end, size, slots_line, BLOCK_SIZE, RANGE)
            tl.store(lengths + row, size + context_end - reused_end)
