"""How the host cuts the rows of a step into groups.

A group is selected and attended together: its votes fit the workspace, beside its scores where they are
stored. How much a row takes of either follows from its own candidates. Everything here is NumPy; `sending`
takes what was cut to the device.

Rows of few queries, generated tokens and those of a prompt's tail, have their scores stored. Chunks of a
prompt share the reading of keys so well that their scores are computed twice. Which way a row takes follows
from its number of queries and the server's options alone. So a row has the same bits whenever it is
computed, in a captured step too, where any row of so few queries may stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.kernels.score.gpu import tile_rows
from vllm_tokenselect.method.plan import Int64, SelectionPlan
from vllm_tokenselect.method.requests import Int32

# Chunks that share a tile, at most: those of a step of 8K tokens, 512 each.
MOST_CHUNKS = 16

Table = TypeVar("Table", Int32, torch.Tensor)  # on the host, on the device


class Tiles(NamedTuple, Generic[Table]):
    """Rows that share the reading of a request's keys.

    Attributes:
        table: int32 [tiles, 3], of each the request, the first row and the number of rows.
        rows_per_tile: most rows of one of them.
    """

    table: Table
    rows_per_tile: int


@dataclass(frozen=True)
class GroupCut:
    """Rows [first, last) of a step; the other attributes are those of `rows.RowGroup`, on the host.

    Attributes:
        columns: int32 [R + 1], where those of each row start.
        widest: of them.
    """

    first: int
    last: int
    follows: bool
    queries: slice
    query_start_loc: Int32
    chains: Int32
    single_rows: bool
    tiles: tuple[Tiles[Int32], ...]
    rescores: bool
    columns: Int32
    widest: int
    num_columns: int
    max_query_len: int
    max_length: int
    table_width: int


def cut_step(plan: SelectionPlan, limits: StepLimits) -> list[GroupCut]:
    """Groups that are as large as the contexts of their rows allow.

    Where layers share selections, a group follows as a whole or not at all.
    """
    groups = []
    widths = row_columns(plan, limits)
    for first, last, follows, rescores in _cut_groups(plan, widths, limits):
        columns = _columns(widths[first:last], last - first)
        chains = _chain_runs(plan, first, last)
        queries = slice(
            int(plan.query_start[first]),
            int(plan.query_start[last - 1] + plan.query_len[last - 1]),
        )
        groups.append(
            GroupCut(
                first=first,
                last=last,
                follows=follows,
                queries=queries,
                query_start_loc=_query_start_loc(plan, first, last, queries),
                chains=chains,
                single_rows=int(chains[:, 1].max(initial=0)) <= 1,
                tiles=_cut_tiles(plan, first, last, limits, rescores),
                rescores=rescores,
                columns=columns,
                widest=int(widths[first:last].max()),
                num_columns=int(columns[-1]),
                max_query_len=int(plan.query_len[first:last].max()),
                max_length=_max_length(plan, first, last, limits),
                table_width=limits.kept_width if follows else limits.line_width,
            )
        )
    return groups


def _cut_tiles(
    plan: SelectionPlan, first: int, last: int, limits: StepLimits, rescores: bool
) -> tuple[Tiles[Int32], ...]:
    """Tiles of the rows [first, last), one compiled kernel for each entry."""
    most_rows = tile_rows(limits.num_heads, limits.num_kv_heads)
    if rescores:
        # A chunk without neighbors is padded too: its bits are those that it has beside others.
        most_rows = min(most_rows, MOST_CHUNKS)
        runs = _tile_runs(plan, first, last, most_rows)
        tiles: tuple[Tiles[Int32], ...] = (Tiles(runs, most_rows),)
    else:
        # A tile of one row is padded to a small product, any other to a full one.
        runs = _tile_runs(plan, first, last, most_rows)
        single, shared = runs[runs[:, 2] == 1], runs[runs[:, 2] > 1]
        tiles = (Tiles(single, 1), Tiles(shared, most_rows))
    return tuple(each for each in tiles if len(each.table))


def cut_graph_step(
    plan: SelectionPlan, limits: StepLimits, num_tokens: int, queries_per_request: int
) -> list[GroupCut]:
    """Groups whose shapes depend on `num_tokens` and `queries_per_request` alone.

    There is a row for every token, padded ones behind those of the plan, with a tile and a chain each:
    those behind the plan's are without rows. All of them follow where layers share selections.

    Raises:
        RuntimeError: when the contexts of a group do not fit the workspace at once.
    """
    most_rows = min(queries_per_request, tile_rows(limits.num_heads, limits.num_kv_heads))
    widths = row_columns(plan, limits)
    groups = []
    for first, last in graph_spans(limits, num_tokens, queries_per_request):
        columns = _columns(widths[first:last], last - first)
        if columns[-1] > limits.score_columns:
            raise RuntimeError(
                f"a step that a CUDA graph may replay has {columns[-1]} candidates in {last - first} rows, "
                f"and the workspace holds the scores of {limits.score_columns}; the scheduler should have "
                "kept the step smaller. Please report this with the server's options. --enforce-eager "
                "serves it."
            )
        tiles: tuple[Tiles[Int32], ...] = ()
        if limits.max_width:
            runs = _tile_runs(plan, first, min(last, plan.num_rows), most_rows)
            tiles = (Tiles(_padded(runs, last - first), most_rows),)
        chains = _chain_runs(plan, first, min(last, plan.num_rows))
        # A row has a query at least: those of row `r` are not before query `r`.
        queries = slice(first, min(last * queries_per_request, num_tokens))
        groups.append(
            GroupCut(
                first=first,
                last=last,
                follows=limits.method.shares_selections,
                queries=queries,
                query_start_loc=_query_start_loc(plan, first, last, queries),
                chains=_padded(chains, last - first if limits.method.reuses_selections else 0),
                single_rows=queries_per_request == 1,
                tiles=tiles,
                rescores=False,
                columns=columns,
                widest=limits.max_width,
                num_columns=min((last - first) * limits.max_width, limits.score_columns),
                max_query_len=queries_per_request,
                max_length=limits.table_width,
                table_width=limits.line_width,
            )
        )
    return groups


def graph_spans(
    limits: StepLimits, num_tokens: int, queries_per_request: int
) -> Iterator[tuple[int, int]]:
    """First and last row of each group that a CUDA graph may replay."""
    rows = _whole_requests(limits.table_rows, queries_per_request)
    for first in range(0, num_tokens, rows):
        yield first, min(first + rows, num_tokens)


def _whole_requests(rows: int, queries_per_request: int) -> int:
    """So many rows at most: those of a request share a tile, and stay together where possible."""
    return rows - rows % queries_per_request if rows > queries_per_request else rows


def _cut_groups(
    plan: SelectionPlan, widths: Int64, limits: StepLimits
) -> list[tuple[int, int, bool, bool]]:
    """First and last row of each group, whether it follows, and whether its scores are computed twice."""
    return [
        (*rows, follows, rescores)
        for first, last, follows, rescores in _cut_kinds(plan, limits)
        for rows in _cut_rows(
            *(widths, first, last),
            limits.vote_columns if rescores else limits.score_columns,
            limits.table_rows,
        )
    ]


def _cut_kinds(plan: SelectionPlan, limits: StepLimits) -> list[tuple[int, int, bool, bool]]:
    """Runs of rows that may be in one group, whether they follow, and whether they are scored twice.

    Rows of one query stand apart from longer ones, to ask with their queries where they lie. A dense token
    may stand among all kinds. Where selections are shared its line must be one that is kept, since every
    layer would write the same into it.
    """
    if not plan.num_rows:
        return []
    shares = limits.method.shares_selections
    either = plan.dense & (plan.query_len == 1)
    if shares:
        either &= plan.chunk_end <= limits.kept_width
    kinds = np.stack(
        [plan.follows & shares, plan.query_len > limits.graph_queries, plan.query_len > 1]
    )
    decided = np.flatnonzero(~either)
    if not len(decided):
        return [(0, plan.num_rows, shares, False)]
    changes = np.flatnonzero((np.diff(kinds[:, decided]) != 0).any(0)) + 1
    firsts = [0, *decided[changes].tolist()]
    follows, rescores, _ = kinds[:, decided[[0, *changes]]].tolist()
    return list(zip(firsts, [*firsts[1:], plan.num_rows], follows, rescores, strict=True))


def _cut_rows(
    widths: Int64, first: int, last: int, most_columns: int, most_rows: int
) -> list[tuple[int, int]]:
    """The rows [first, last) in runs of so many columns and rows at most; a row alone fits always."""
    runs = []
    ends = np.cumsum(widths[first:last])
    start, taken = 0, 0
    while start < len(ends):
        fitting = int(np.searchsorted(ends, taken + most_columns, side="right"))
        end = min(max(fitting, start + 1), start + most_rows)
        runs.append((first + start, first + end))
        start, taken = end, int(ends[end - 1])
    return runs


def row_columns(plan: SelectionPlan, limits: StepLimits) -> Int64:
    """Columns of each row, int64 [R]: none of a row that may not select."""
    return np.where(plan.dense, 0, limits.widths_of(plan.candidate_end.astype(np.int64)))


def _columns(widths: Int64, num_rows: int) -> Int32:
    """Where the columns of each row start, int32 [num_rows + 1]; padded rows have none."""
    starts = np.zeros(num_rows + 1, np.int32)
    np.cumsum(widths, out=starts[1 : len(widths) + 1])
    starts[len(widths) + 1 :] = starts[len(widths)]
    return starts


def _max_length(plan: SelectionPlan, first: int, last: int, limits: StepLimits) -> int:
    """Most tokens that a row of [first, last) attends to."""
    dense = plan.chunk_end[first:last][plan.dense[first:last]]
    longest = int(dense.max(initial=0))
    if plan.follows[first:last].any():  # any of them may be shorter than the host knows, and dense
        return max(longest, limits.generated_width)
    return longest if len(dense) == last - first else max(longest, limits.method.max_attended)


def _query_start_loc(plan: SelectionPlan, first: int, last: int, queries: slice) -> Int32:
    """Where the queries of the rows [first, last) start among `queries`; padded rows have none."""
    starts = np.full(last - first + 1, int(plan.query_len.sum()), np.int32)
    known = plan.query_start[first : last + 1]
    starts[: len(known)] = known
    starts -= queries.start
    return starts.clip(0, queries.stop - queries.start, out=starts)


def _tile_runs(plan: SelectionPlan, first: int, last: int, most_rows: int) -> Int32:
    """Runs of rows of one request that may select, int32 [runs, 3], rows counted from `first`.

    Rows that take part in the Selection Cache share no tile with others.
    """
    seqs = plan.row_seq[first:last]
    kinds = 2 * seqs + plan.caches[first:last]
    rows, counts = _runs(~plan.dense[first:last], kinds, most_rows)
    return np.stack([seqs[rows], rows, counts], axis=1).astype(np.int32)


def _chain_runs(plan: SelectionPlan, first: int, last: int) -> Int32:
    """Runs of rows of one request in the Selection Cache, int32 [runs, 2], counted from `first`."""
    runs = _runs(plan.caches[first:last], plan.row_seq[first:last])
    return np.stack(runs, axis=1).astype(np.int32)


def _runs(
    chosen: npt.NDArray[np.bool_], kinds: Int32, most_rows: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Runs of chosen rows of one kind, no longer than `most_rows`: first rows and lengths."""
    rows = np.flatnonzero(chosen)
    order = np.arange(len(rows))
    breaks = np.ones(len(rows), bool)
    breaks[1:] = (np.diff(kinds[rows]) != 0) | (np.diff(rows) != 1)
    in_run = order - np.maximum.accumulate(np.where(breaks, order, 0))
    starts = np.flatnonzero(in_run % (most_rows or len(rows) + 1) == 0)
    return rows[starts], np.diff(starts, append=len(rows))


def _padded(table: Int32, length: int) -> Int32:
    """The table with zeros up to `length` lines."""
    padded = np.zeros((length, table.shape[1]), np.int32)
    padded[: len(table)] = table
    return padded
