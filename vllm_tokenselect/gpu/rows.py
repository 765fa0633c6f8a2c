"""The rows of one step as the layers of a GPU see them.

They differ from a CPU's in two ways. Positions are computed on the device: the host knows an upper bound
of every context only, since draft tokens may have been rejected meanwhile, so it sends how far each row
ends before its request does. And a CUDA graph replays a step: what it reads must lie at fixed addresses,
and shapes may depend on the number of tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from vllm_tokenselect.gpu.cutting import GroupCut, Tiles, cut_graph_step, cut_step
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.sending import DeviceRows, RowBuffers, pack_rows, send_rows
from vllm_tokenselect.kernels.columns import Columns
from vllm_tokenselect.kernels.selection_cache.gpu_rows import RowArrays
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import Int32

PER_ROW = tuple(field.name for field in fields(RowArrays) if field.name != "chains")


@dataclass(frozen=True)
class RowGroup(RowArrays):
    """Consecutive rows of a step that are selected and attended together.

    Attributes:
        limits: by which the step was cut.
        first: the first of them in the step.
        follows: whether its rows attend to what an anchor selects in every layer that follows it; their
            lines of the sparse block table are kept for the step.
        single_rows: whether no chain has several rows.
        queries: which of the step's queries are the group's, on the host; fixed for a captured step. Where
            every row has one query, query `r` of the group is row `r`'s.
        query_start_loc: int32 [R + 1], where the queries of each row start among the group's.
        tiles: of the rows that may select; empty if none may.
        rescores: whether the scores of its rows are computed twice, in place of stored.
        columns: of the rows in the workspace; a row that may not select has none. The widest is 0 if none
            may.
        num_columns: of all rows, at most.
        query_starts, query_lens: `query_start_loc` without its last entry and `query_len`, on the host.
        max_query_len: most queries of a row.
        max_length: most tokens that a row attends to.
        table_width: of the sparse block table.
    """

    limits: StepLimits
    first: int
    follows: bool
    single_rows: bool
    queries: slice
    query_start_loc: torch.Tensor
    tiles: tuple[Tiles[torch.Tensor], ...]
    rescores: bool
    columns: Columns
    num_columns: int
    query_starts: Int32
    query_lens: Int32
    max_query_len: int
    max_length: int
    table_width: int

    @property
    def num_rows(self) -> int:
        return len(self.row_seq)

    def part(self, first: int, last: int) -> RowGroup:
        """The rows [first, last) with their queries, to be attended apart.

        Not of a captured step, whose rows the host does not know. Tiles and chains stay the group's.
        """
        if (first, last) == (0, self.num_rows):
            return self
        rows, lens = slice(first, last), self.query_lens[first:last]
        start = int(self.query_starts[first])
        stop = int(self.query_starts[last - 1]) + int(lens[-1])
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in PER_ROW},
            first=self.first + first,
            queries=slice(self.queries.start + start, self.queries.start + stop),
            query_start_loc=self.query_start_loc[first : last + 1] - start,
            query_starts=self.query_starts[rows] - start,
            query_lens=lens,
            max_query_len=int(lens.max()),
        )


def step_rows(
    plan: SelectionPlan,
    seq_lens: Int32,
    device_seq_lens: torch.Tensor,
    limits: StepLimits,
) -> list[RowGroup]:
    """Groups of a step, cut so that their votes and the scores that are stored fit the workspace.

    Args:
        plan: rows of the step in order of their queries.
        seq_lens: int32 [S], an upper bound of every context; what the plan was built from.
        device_seq_lens: int32 [S] on the device, the contexts' real lengths.
        limits: of the buffers.
    """
    groups, num_rows = cut_step(plan, limits), plan.num_rows
    buffers = RowBuffers(num_rows, device_seq_lens.device)
    packed = pack_rows(plan, seq_lens, groups, num_rows, limits.method)
    rows = send_rows(packed, num_rows, buffers, device_seq_lens, limits.method)
    return _groups(groups, rows, limits)


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
    every token, padded ones behind those that the plan has.

    Args:
        buffers: persistent, for at least `num_tokens` rows.
        num_tokens: tokens of the step, padding included.
        queries_per_request: most tokens of a request.

    Raises:
        RuntimeError: when the contexts of a group do not fit the workspace at once.
    """
    groups = cut_graph_step(plan, limits, num_tokens, queries_per_request)
    packed = pack_rows(plan, seq_lens, groups, num_tokens, limits.method)
    rows = send_rows(packed, num_tokens, buffers, device_seq_lens, limits.method)
    return _groups(groups, rows, limits)


def _groups(cuts: list[GroupCut], rows: DeviceRows, limits: StepLimits) -> list[RowGroup]:
    """The groups' views of the step's rows."""
    groups = []
    for number, cut in enumerate(cuts):
        first, last = cut.first, cut.last
        candidate_end, context_end, scored_end, table_end, reused_end = rows.ends[:, first:last]
        groups.append(
            RowGroup(
                limits=limits,
                first=first,
                follows=cut.follows,
                queries=cut.queries,
                row_seq=rows.row_seq[first:last],
                query_start_loc=rows.query_start_loc[first + number :][: last - first + 1],
                query_len=rows.query_len[first:last],
                top_k=rows.top_k[first:last],
                seat=rows.seat[first:last],
                cached_seat=rows.cached_seat[first:last],
                owner=rows.owner[first:last],
                candidate_end=candidate_end,
                context_end=context_end,
                scored_end=scored_end,
                table_end=table_end,
                reused_end=reused_end,
                chains=rows.chains[first:][: len(cut.chains)],
                single_rows=cut.single_rows,
                tiles=_tiles(cut, rows.tiles[first:]),
                rescores=cut.rescores,
                columns=Columns(rows.columns[first + number :][: last - first + 1], cut.widest),
                num_columns=cut.num_columns,
                query_starts=cut.query_start_loc[:-1],
                query_lens=np.diff(cut.query_start_loc),
                max_query_len=cut.max_query_len,
                max_length=cut.max_length,
                table_width=cut.table_width,
            )
        )
    return groups


def _tiles(cut: GroupCut, sent: torch.Tensor) -> tuple[Tiles[torch.Tensor], ...]:
    found, start = [], 0
    for table, rows_per_tile in cut.tiles:
        found.append(Tiles(sent[start : start + len(table)], rows_per_tile))
        start += len(table)
    return tuple(found)
