"""The rows of one step on a GPU.

The host knows how a step is cut into rows and an upper bound of every context; what a context's length
really is only the device knows (draft tokens may have been rejected meanwhile). So the host sends how
far each row ends before its request does, and positions are computed on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.kernels.score.gpu import tile_rows
from vllm_tokenselect.kernels.selection_cache.state import SELECTS
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import NO_SEAT, Int32
from vllm_tokenselect.method.settings import Method

# Entries of what the host sends of a row: five numbers, a tile, a chain and where its queries start (one
# more for each group, of which there are no more than rows); and of what is found there.
FIELDS, SENT_FIELDS, ENDS = 5, 5 + 3 + 4 + 2, 5


@dataclass(frozen=True)
class Tiles:
    """Rows that share the reading of a request's keys.

    Attributes:
        table: int32 [tiles, 3], of each the request, the first row and the number of rows.
        rows_per_tile: most rows of one of them.
    """

    table: torch.Tensor
    rows_per_tile: int


@dataclass(frozen=True)
class ScorePass:
    """Consecutive rows of a group that are scored together: their scores fit the workspace.

    Attributes:
        first, last: the rows, counted from the group's first.
        tiles: of those of them that may select, rows counted from `first`.
    """

    first: int
    last: int
    tiles: tuple[Tiles, ...]


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of a step that are selected and attended together.

    Attributes:
        queries: the group's among the step's, on the host: which of a captured step's is fixed. Of one
            whose rows have a single query each, query `r` of the group is row `r`'s.
        row_seq: int32 [R], the row's request.
        query_start_loc: int32 [R + 1], where the queries of each row start among the group's.
        query_len: int32 [R]; 0 for a padded row.
        top_k: int32 [R], candidates that the row selects.
        seat: int32 [R], of the row's request; -1 for a padded row and where there is no request.
        candidate_end: int32 [R], `a - n_local`.
        context_end: int32 [R], `b`; 0 for a padded row.
        scored_end: int32 [R], `a - n_local` of a row that selects, `n_init` of any other.
        table_end: int32 [R], `b`; 0 for a padded row and for one that reuses a selection.
        reused_end: int32 [R], where the candidates of the selection ended that the row reuses; -1 for
            a row that reuses none.
        chains: int32 [chains, 4], rows that take part in the Selection Cache: of each run of one
            request's the first row, the number of rows, their seat and its owner.
        passes: over the rows that may select; none if there is none.
        width: most candidates of a row that may select, rounded up; 0 if there is none.
        query_starts, query_lens: `query_start_loc` without its last entry and `query_len`, on the host.
        max_query_len: most queries of a row.
        max_length: most tokens that a row attends to.
        table_width: of the sparse block table.

    Every layer writes `scored_end`, `table_end` and `reused_end` of the rows of chains anew.
    """

    queries: slice
    row_seq: torch.Tensor
    query_start_loc: torch.Tensor
    query_len: torch.Tensor
    top_k: torch.Tensor
    seat: torch.Tensor
    candidate_end: torch.Tensor
    context_end: torch.Tensor
    scored_end: torch.Tensor
    table_end: torch.Tensor
    reused_end: torch.Tensor
    chains: torch.Tensor
    passes: tuple[ScorePass, ...]
    width: int
    query_starts: Int32
    query_lens: Int32
    max_query_len: int
    max_length: int
    table_width: int

    @property
    def num_rows(self) -> int:
        return len(self.row_seq)


class RowBuffers:
    """Device arrays for the rows of a step.

    Args:
        capacity: most rows.
        device: where the arrays lie.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        size = _field_size(capacity)
        self.sent = torch.zeros(SENT_FIELDS * size, dtype=torch.int32, device=device)
        self.ends = torch.zeros(ENDS * size, dtype=torch.int32, device=device)


def step_rows(
    plan: SelectionPlan,
    seq_lens: Int32,
    device_seq_lens: torch.Tensor,
    limits: StepLimits,
) -> list[RowGroup]:
    """Groups of a step, cut so that their votes and the scores of a pass fit the workspace.

    Args:
        plan: rows of the step in order of their queries.
        seq_lens: int32 [S], an upper bound of every context; what the plan was built from.
        device_seq_lens: int32 [S] on the device, the contexts' real lengths.
        limits: of the buffers.
    """
    most_rows = tile_rows(limits.num_heads, limits.num_kv_heads)
    sent = _Sent(plan.num_rows)
    sent.write_rows(plan, seq_lens)
    groups: list[_GroupSizes] = []
    for first, last in _cut_groups(plan, limits):
        width = _width(plan, first, last, limits)
        passes = []
        for start, end in _cut_passes(first, last, limits.pass_rows(last - first, width)):
            found = _tile_runs(plan, start, end, most_rows)
            # A tile of one row is padded to a small product, any other to a full one: two compiled
            # kernels serve every step.
            single, shared = found[found[:, 2] == 1], found[found[:, 2] > 1]
            sent.tiles[start : start + len(found)] = np.concatenate([single, shared])
            classes = [(len(t), size) for t, size in ((single, 1), (shared, most_rows)) if len(t)]
            if classes:
                passes.append(_PassSizes(start, end, classes))
        chains = sent.write_chains(plan, first, last)
        longest = _max_length(plan, first, last, limits)
        max_query_len = int(plan.query_len[first:last].max())
        queries = slice(
            int(plan.query_start[first]),
            int(plan.query_start[last - 1] + plan.query_len[last - 1]),
        )
        starts = sent.write_starts(plan, first, last, queries, len(groups))
        groups.append(
            _GroupSizes(
                *(first, last, queries, starts, passes, chains),
                *(width, max_query_len, longest, limits.table_width),
            )
        )
    buffers = RowBuffers(plan.num_rows, device_seq_lens.device)
    device = sent.send(buffers, device_seq_lens, limits.method)
    return [device.group(sent, group) for group in groups]


def graph_rows(
    plan: SelectionPlan,
    seq_lens: Int32,
    device_seq_lens: torch.Tensor,
    limits: StepLimits,
    buffers: RowBuffers,
    num_tokens: int,
    queries_per_request: int,
) -> list[RowGroup]:
    """Groups of a step that a CUDA graph may replay.

    Shapes and addresses depend on `num_tokens` and `queries_per_request` alone: there is a row for
    every token, padded ones behind those that the plan has, and groups and passes are cut for the
    longest context that the model may have.

    Args:
        buffers: persistent, for at least `num_tokens` rows.
        num_tokens: tokens of the step, padding included.
        queries_per_request: most tokens of a request.
    """
    most_rows = min(queries_per_request, tile_rows(limits.num_heads, limits.num_kv_heads))
    sent = _Sent(num_tokens)
    sent.write_rows(plan, seq_lens)
    groups: list[_GroupSizes] = []
    for first, last, cut in cut_for_graph(limits, num_tokens, queries_per_request):
        passes = []
        for start, end in cut:
            found = _tile_runs(plan, start, min(end, plan.num_rows), most_rows)
            sent.tiles[start : start + len(found)] = found
            passes.append(_PassSizes(start, end, [(end - start, most_rows)]))
        sent.write_chains(plan, first, min(last, plan.num_rows))
        chains = last - first if limits.method.reuses_selections else 0
        # A row has a query at least: those of row `r` are not before query `r`.
        queries = slice(first, min(last * queries_per_request, num_tokens))
        starts = sent.write_starts(plan, first, last, queries, len(groups))
        groups.append(
            _GroupSizes(
                *(first, last, queries, starts, passes, chains),
                *(limits.max_width, queries_per_request, limits.table_width, limits.table_width),
            )
        )
    device = sent.send(buffers, device_seq_lens, limits.method)
    return [device.group(sent, group) for group in groups]


def cut_for_graph(
    limits: StepLimits, num_tokens: int, queries_per_request: int
) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Groups of a step that a CUDA graph may replay: first row, last row, and those of each pass."""
    width = limits.max_width
    rows = _whole_requests(limits.group_rows(width), queries_per_request)
    groups = []
    for first in range(0, num_tokens, rows):
        last = min(first + rows, num_tokens)
        pass_rows = _whole_requests(limits.pass_rows(last - first, width), queries_per_request)
        groups.append((first, last, _cut_passes(first, last, pass_rows) if width else []))
    return groups


def _whole_requests(rows: int, queries_per_request: int) -> int:
    """So many rows at most: those of a request share a tile, and stay together where possible."""
    return rows - rows % queries_per_request if rows > queries_per_request else rows


def _cut_passes(first: int, last: int, rows: int) -> list[tuple[int, int]]:
    """First and last row of each pass."""
    return [(start, min(start + rows, last)) for start in range(first, last, rows)]


def _field_size(num_rows: int) -> int:
    """Entries of a field: one more than rows, and a multiple of 16 bytes."""
    return -(-(num_rows + 1) // 4) * 4


def _split(sent: Any, size: int) -> tuple[Any, Any, Any, Any]:
    """Fields, tiles, chains and starts in an array or tensor that is sent."""
    fields, tiles, chains = FIELDS * size, (FIELDS + 3) * size, (FIELDS + 7) * size
    return (
        sent[:fields].reshape(FIELDS, size),
        sent[fields:tiles].reshape(-1, 3),
        sent[tiles:chains].reshape(-1, 4),
        sent[chains:],
    )


@dataclass(frozen=True)
class _PassSizes:
    """What the host decides of a pass: the step's rows [first, last), and see `ScorePass`.

    Attributes:
        tiles: number of tiles and most rows of a tile, of each class.
    """

    first: int
    last: int
    tiles: list[tuple[int, int]]


@dataclass(frozen=True)
class _GroupSizes:
    """What the host decides of a group: rows [first, last), and see `RowGroup`.

    Attributes:
        queries: as `RowGroup.queries`.
        starts: first entry of its `query_start_loc`.
        chains: number of chains.
    """

    first: int
    last: int
    queries: slice
    starts: int
    passes: list[_PassSizes]
    chains: int
    width: int
    max_query_len: int
    max_length: int
    table_width: int


class _Sent:
    """What the host sends of a step, in one array: one copy to the device."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.size = size = _field_size(num_rows)
        self.array = np.zeros(SENT_FIELDS * size, np.int32)
        fields, tiles, chains, self.starts = _split(self.array, size)
        self.row_seq, self.query_len, self.after, self.top_k, self.seat = fields
        self.seat[:] = NO_SEAT
        self.tiles, self.chains = tiles, chains

    def write_rows(self, plan: SelectionPlan, seq_lens: Int32) -> None:
        rows = slice(plan.num_rows)
        self.row_seq[rows] = plan.row_seq
        self.query_len[rows] = plan.query_len
        self.after[rows] = seq_lens[plan.row_seq] - plan.chunk_end
        self.top_k[rows] = plan.top_k
        self.seat[rows] = plan.seat

    def write_starts(
        self, plan: SelectionPlan, first: int, last: int, queries: slice, group: int
    ) -> int:
        """Where the queries of the rows [first, last) start in the group's; returns the first entry.

        Padded rows are without queries behind the others.
        """
        starts = np.full(last - first + 1, int(plan.query_len.sum()))
        known = plan.query_start[first : last + 1]
        starts[: len(known)] = known
        entry = first + group
        self.starts[entry : entry + len(starts)] = np.clip(
            starts - queries.start, 0, queries.stop - queries.start
        )
        return entry

    def write_chains(self, plan: SelectionPlan, first: int, last: int) -> int:
        """Chains of the rows [first, last); returns how many there are."""
        rows, counts = _runs(plan.caches[first:last], plan.row_seq[first:last])
        seat, owner = plan.seat[first:last][rows], plan.owner[first:last][rows]
        self.chains[first : first + len(rows)] = np.stack([rows, counts, seat, owner], axis=1)
        return len(rows)

    def send(self, buffers: RowBuffers, seq_lens: torch.Tensor, method: Method) -> _OnDevice:
        source = torch.from_numpy(self.array)
        if buffers.sent.is_cuda:
            source = source.pin_memory()  # a copy from pageable memory would wait for the device
        sent = buffers.sent[: len(source)]
        sent.copy_(source, non_blocking=True)
        rows, tiles, chains, starts = _split(sent, self.size)
        row_seq, query_len, after, top_k, _ = rows
        context_end = (seq_lens[row_seq.long()] - after) * (query_len > 0)
        candidate_end = context_end - query_len - method.n_local
        selects = candidate_end - method.n_init > top_k
        scored_end = torch.where(selects, candidate_end, method.n_init)
        reused_end = torch.full_like(context_end, SELECTS)
        ends = buffers.ends[: ENDS * self.size].view(ENDS, self.size)
        torch.stack([candidate_end, context_end, scored_end, context_end, reused_end], out=ends)
        return _OnDevice(rows, ends, tiles, chains, starts)


@dataclass(frozen=True)
class _OnDevice:
    rows: torch.Tensor
    ends: torch.Tensor
    tiles: torch.Tensor
    chains: torch.Tensor
    starts: torch.Tensor

    def group(self, sent: _Sent, sizes: _GroupSizes) -> RowGroup:
        first, last = sizes.first, sizes.last
        row_seq, query_len, _, top_k, seat = self.rows
        starts = slice(sizes.starts, sizes.starts + last - first + 1)
        candidate_end, context_end, scored_end, table_end, reused_end = self.ends[:, first:last]
        return RowGroup(
            queries=sizes.queries,
            row_seq=row_seq[first:last],
            query_start_loc=self.starts[starts],
            query_len=query_len[first:last],
            top_k=top_k[first:last],
            seat=seat[first:last],
            candidate_end=candidate_end,
            context_end=context_end,
            scored_end=scored_end,
            table_end=table_end,
            reused_end=reused_end,
            chains=self.chains[first : first + sizes.chains],
            passes=tuple(self._score_pass(part, first) for part in sizes.passes),
            width=sizes.width,
            query_starts=sent.starts[starts][:-1],
            query_lens=sent.query_len[first:last],
            max_query_len=sizes.max_query_len,
            max_length=sizes.max_length,
            table_width=sizes.table_width,
        )

    def _score_pass(self, sizes: _PassSizes, group_first: int) -> ScorePass:
        tiles, start = [], sizes.first
        for count, rows_per_tile in sizes.tiles:
            tiles.append(Tiles(self.tiles[start : start + count], rows_per_tile))
            start += count
        return ScorePass(sizes.first - group_first, sizes.last - group_first, tuple(tiles))


def _cut_groups(plan: SelectionPlan, limits: StepLimits) -> list[tuple[int, int]]:
    """First and last row of each group."""
    if plan.num_rows <= limits.group_rows(_width(plan, 0, plan.num_rows, limits)):
        return [(0, plan.num_rows)] if plan.num_rows else []
    groups: list[tuple[int, int]] = []
    first, widest = 0, 0
    for row in range(plan.num_rows):
        width = 0 if plan.dense[row] else limits.width_of(int(plan.candidate_end[row]))
        widest = max(widest, width)
        if row > first and row - first + 1 > limits.group_rows(widest):
            groups.append((first, row))
            first, widest = row, width
    groups.append((first, plan.num_rows))
    return groups


def _width(plan: SelectionPlan, first: int, last: int, limits: StepLimits) -> int:
    ends = plan.candidate_end[first:last][~plan.dense[first:last]]
    return limits.width_of(int(ends.max())) if len(ends) else 0


def _max_length(plan: SelectionPlan, first: int, last: int, limits: StepLimits) -> int:
    """Most tokens that a row of [first, last) attends to."""
    dense = plan.chunk_end[first:last][plan.dense[first:last]]
    sparse = 0 if len(dense) == last - first else limits.method.max_attended
    return max(int(dense.max(initial=0)), sparse)


def _tile_runs(plan: SelectionPlan, first: int, last: int, most_rows: int) -> Int32:
    """Runs of rows of one request that may select, int32 [runs, 3], rows counted from `first`."""
    seqs = plan.row_seq[first:last]
    rows, counts = _runs(~plan.dense[first:last], seqs, most_rows)
    return np.stack([seqs[rows], rows, counts], axis=1).astype(np.int32)


def _runs(
    chosen: npt.NDArray[np.bool_], seqs: Int32, most_rows: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Runs of chosen rows of one request, no longer than `most_rows`: first rows and lengths."""
    rows = np.flatnonzero(chosen)
    order = np.arange(len(rows))
    breaks = np.ones(len(rows), bool)
    breaks[1:] = (np.diff(seqs[rows]) != 0) | (np.diff(rows) != 1)
    in_run = order - np.maximum.accumulate(np.where(breaks, order, 0))
    starts = np.flatnonzero(in_run % (most_rows or len(rows) + 1) == 0)
    return rows[starts], np.diff(starts, append=len(rows))
