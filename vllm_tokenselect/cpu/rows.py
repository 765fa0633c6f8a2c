"""The rows of one step on a CPU.

The GPU's `RowGroup` is another class. Its positions are computed on the device, because draft tokens may
have been rejected meanwhile and only the device knows; so it also holds what its kernels need to leave rows
out. On a CPU the host knows every position, and compiled code takes a group's arrays as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokenselect.kernels.block_table.cpu import build_rows
from vllm_tokenselect.kernels.cpu_arrays import int32_array
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import Int32
from vllm_tokenselect.method.settings import Method

_NO_VOTES = np.empty((0, 0), np.float32)


class RowGroup(NamedTuple):
    """Consecutive rows of a step that are selected and attended together.

    All of them select or none does; all follow or none does; all have one query or all have several.

    Attributes:
        row_seq: int32 [R], the row's request.
        query_start: int32 [R], first query of the row among the step's.
        query_len: int32 [R].
        top_k: int32 [R], candidates that the row selects.
        seat: int32 [R], of the row's request; -1 where there is no request.
        owner: int32 [R], which owner of the seat the request is.
        caches: bool [R], the row takes part in the Selection Cache; only rows of one query do.
        candidate_end: int32 [R], `a - n_local`.
        context_end: int32 [R], `b`.
        slots: int32 [R, width], sparse block table of page size 1, ascending by position.
        lengths: int32 [R], entries of each row.
        selects: whether the rows have more than `top_k` candidates. Layers fill `slots` and `lengths` of
            such rows anew; those of the others are filled once a step.
        follows: whether the rows are generated tokens that select. A layer that follows an anchor leaves
            their `slots` and `lengths` as the anchor has filled them.
        max_query_len: most queries of a row.
    """

    row_seq: Int32
    query_start: Int32
    query_len: Int32
    top_k: Int32
    seat: Int32
    owner: Int32
    caches: npt.NDArray[np.bool_]
    candidate_end: Int32
    context_end: Int32
    slots: Int32
    lengths: Int32
    selects: bool
    follows: bool
    max_query_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_seq)

    def build_table(
        self, votes: np.ndarray, block_table: np.ndarray, block_size: int, n_init: int
    ) -> None:
        """Fill `slots` and `lengths`.

        Args:
            votes: fp32 [R, N], contiguous; of no element for rows that select nothing.
            block_table: int32 [S, W], KV blocks of each request.
            block_size: tokens of a KV block.
            n_init: length of the sink.
        """
        build_rows(
            np.arange(self.num_rows),
            votes,
            block_table,
            self.row_seq,
            n_init,
            self.top_k,
            self.candidate_end,
            self.context_end,
            block_size,
            self.slots,
            self.lengths,
        )


def step_rows(
    plan: SelectionPlan,
    block_table: torch.Tensor,
    block_size: int,
    num_heads: int,
    method: Method,
    workspace_bytes: int,
) -> list[RowGroup]:
    """Groups of a step, cut so that their scores fit the workspace.

    Args:
        plan: rows of the step.
        block_table: int32 [S, W], KV blocks of each request of the batch.
        block_size: tokens of a KV block.
        num_heads: query heads of a layer.
        method: the settings.
        workspace_bytes: for the scores of a group; one row's are computed however large they are.

    Returns:
        in the order of `SelectionPlan.by_kind`.
    """
    plan = plan.by_kind()
    lengths, blocks = plan.lengths(method), int32_array(block_table)
    # A reused selection sees what has left the local window since.
    longest = int(lengths.max(initial=0)) + method.refresh_interval
    slots = np.empty((plan.num_rows, longest), np.int32)
    groups = []
    for first, last in _cut_groups(plan, num_heads, method.n_init, workspace_bytes):
        rows = slice(first, last)
        group = RowGroup(
            row_seq=plan.row_seq[rows],
            query_start=plan.query_start[rows],
            query_len=plan.query_len[rows],
            top_k=plan.top_k[rows],
            seat=plan.seat[rows],
            owner=plan.owner[rows],
            caches=plan.caches[rows],
            candidate_end=plan.candidate_end[rows],
            context_end=plan.chunk_end[rows],
            slots=slots[rows],
            lengths=lengths[rows],
            selects=not plan.dense[first],
            follows=bool(plan.follows[first]),
            max_query_len=int(plan.query_len[rows].max()) if plan.kinds[first] % 2 else 1,
        )
        if not group.selects:
            group.build_table(_NO_VOTES, blocks, block_size, method.n_init)
        groups.append(group)
    return groups


def _cut_groups(
    plan: SelectionPlan, num_heads: int, n_init: int, workspace_bytes: int
) -> list[tuple[int, int]]:
    """First and last row of each group."""
    candidates = np.where(plan.dense, 0, plan.candidate_end - n_init).tolist()
    kinds = plan.kinds
    groups = []
    first, most = 0, 0
    for row in range(plan.num_rows):
        most = max(most, candidates[row])
        too_large = 4 * num_heads * most * (row - first + 1) > workspace_bytes
        if row > first and (too_large or kinds[row] != kinds[first]):
            groups.append((first, row))
            first, most = row, candidates[row]
    return [*groups, (first, plan.num_rows)] if plan.num_rows else []
