"""Rows of a plan -> sparse block table: which cached tokens every row attends to.

    mean query -> score -> soft vote -> top-k -> sparse block table

One way for prompt chunks, the prompt's tail and generated tokens. Source of the method: TokenSelect,
arXiv 2411.02886, sections 3.2 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.operations import Operations
from vllm_tokenselect.kernels.rotate.reference import rotate
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.single_queries.rows import CachingRows, Layer, SingleQueryRows
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import NO_SEAT
from vllm_tokenselect.method.settings import Method


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of the plan, with their part of every array; cut once a step."""

    first: int
    last: int
    row_seq: torch.Tensor
    query_start: torch.Tensor
    candidate_end: torch.Tensor
    chunk_end: torch.Tensor
    top_k: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor


class StepSelection:
    """The sparse block table of one step, and what is needed to fill it layer by layer.

    Rows that see their whole context get their entries here, once a step; the others once a layer,
    those of several queries in `select`, those of one as they attend.

    Args:
        plan: rows of the step.
        block_table: int32 [S, W], KV blocks of each request of the batch.
        block_size: tokens of a KV block.
        num_heads: query heads of a layer.
        method: the settings.
        operations: the implementation to use.
        counts: int64 [len(Counter)], the counters that rows add to.
        workspace_bytes: for the scores of the rows that are voted on together.
        heads: the processes whose heads vote together; None where a process votes for itself.

    Attributes:
        plan: the rows by kind; everything below is in its order.
        slots: int32 [R, width], block table of page size 1, ascending by position.
        lengths: int32 [R], entries of each row.
        single_queries: work of a layer for the rows of one query, which select as they attend.
        groups: rows of several queries that select, cut so that their scores fit the workspace.
        several_queries: all rows of several queries.
        fixed_counts: int64 [len(Counter)], what a layer adds for the rows that do not take part
            in the Selection Cache.
    """

    def __init__(
        self,
        plan: SelectionPlan,
        block_table: torch.Tensor,
        block_size: int,
        num_heads: int,
        method: Method,
        operations: Operations,
        counts: torch.Tensor,
        workspace_bytes: int = 32 << 20,
        heads: HeadGroup | None = None,
    ) -> None:
        self.plan = plan = plan.by_kind()
        self.block_table = block_table
        self.block_size = block_size
        self.method = method
        self.workspace_bytes = workspace_bytes
        self.operations = operations
        self.heads = heads
        self.counts = counts
        self.fixed_counts = torch.from_numpy(_fixed_counts(plan, method))
        self.row_seq = torch.from_numpy(plan.row_seq)
        self.candidate_end = torch.from_numpy(plan.candidate_end)
        self.chunk_end = torch.from_numpy(plan.chunk_end)
        self.top_k = torch.from_numpy(plan.top_k)
        lengths = np.where(
            plan.dense,
            plan.chunk_end,
            method.n_init + plan.top_k + plan.chunk_end - plan.candidate_end,
        ).astype(np.int32)
        # A reused selection attends to what has left the local window since, besides.
        width = int((lengths + method.refresh_interval * plan.caches).max(initial=0))
        self.slots = torch.empty((plan.num_rows, width), dtype=torch.int32)
        self.lengths = torch.from_numpy(lengths)
        self.query_start = torch.from_numpy(plan.query_start)
        self.single_queries: list[Layer] = []
        if plan.num_dense:
            self._fill(self._rows(0, plan.num_dense), votes=None)
            singles = int((plan.query_len[: plan.num_dense] == 1).sum())
            if singles:
                self.single_queries.append(
                    self._prepare_single_queries(self._rows(0, singles), False)
                )
        self.groups: list[Rows] = []
        for rows in self._group_rows(num_heads):
            if plan.query_len[rows.first] == 1:
                self.single_queries.append(self._prepare_single_queries(rows, True))
            else:
                self.groups.append(rows)
        self.several_queries: list[int] = (plan.query_len > 1).nonzero()[0].tolist()

    def select(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        rotation: Rotation | None = None,
    ) -> None:
        """Fill the table's rows of several queries that select, for one layer.

        Args:
            query: [T, Hq, D], the layer's queries of this step.
            kv_cache: [num_blocks, Hkv, 2, block_size, D].
            scale: the attention's own scale of q . k.
            rotation: the layer's, if positions are reassigned.
        """
        for rows in self.groups:
            mean = self._mean_query(query, rows)
            if rotation is not None:
                mean = rotate(mean, rotation.vote[None])
            logits = self.operations.score_paged_keys(
                mean,
                kv_cache,
                self.block_table,
                rows.row_seq,
                self.method.n_init,
                rows.candidate_end,
                scale,
            )
            votes = self.operations.soft_vote(logits)
            self._fill(rows, votes if self.heads is None else self.heads.sum_votes(votes))

    def _rows(self, first: int, last: int) -> Rows:
        return Rows(
            first,
            last,
            self.row_seq[first:last],
            self.query_start[first:last],
            self.candidate_end[first:last],
            self.chunk_end[first:last],
            self.top_k[first:last],
            self.slots[first:last],
            self.lengths[first:last],
        )

    def _fill(self, rows: Rows, votes: torch.Tensor | None) -> None:
        self.operations.build_sparse_block_table(
            votes,
            self.block_table,
            rows.row_seq,
            self.method.n_init,
            rows.top_k,
            rows.candidate_end,
            rows.chunk_end,
            self.block_size,
            rows.slots,
            rows.lengths,
        )

    def _mean_query(self, query: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Mean query of each row, fp32 [rows, Hq, D]."""
        starts = self.plan.query_start[rows.first : rows.last]
        lens = self.plan.query_len[rows.first : rows.last]
        return torch.stack(
            [
                query[start : start + length].mean(dim=0, dtype=torch.float32)
                for start, length in zip(starts, lens, strict=True)
            ]
        )

    def _group_rows(self, num_heads: int) -> list[Rows]:
        """Cut the selecting rows into groups whose scores fit the workspace.

        A group holds rows of one query or rows of several, never both.
        """
        plan = self.plan
        groups: list[Rows] = []
        first, most = plan.num_dense, 0
        for row in range(plan.num_dense, plan.num_rows):
            candidates = int(plan.candidate_end[row]) - self.method.n_init
            most = max(most, candidates)
            too_large = 4 * num_heads * most * (row - first + 1) > self.workspace_bytes
            other_kind = (plan.query_len[row] == 1) != (plan.query_len[first] == 1)
            if row > first and (too_large or other_kind):
                groups.append(self._rows(first, row))
                first, most = row, candidates
        if first < plan.num_rows:
            groups.append(self._rows(first, plan.num_rows))
        return groups

    def _prepare_single_queries(self, rows: Rows, selects: bool) -> Layer:
        return self.operations.single_queries(
            SingleQueryRows(
                rows.query_start,
                self.block_table,
                rows.row_seq,
                self.method.n_init,
                rows.top_k,
                rows.candidate_end,
                rows.chunk_end,
                self.block_size,
                rows.slots,
                rows.lengths,
                selects,
                self._caching(slice(rows.first, rows.last)),
                self.heads,
            )
        )

    def _caching(self, rows: slice) -> CachingRows | None:
        plan = self.plan
        if not plan.caches[rows].any():
            return None
        return CachingRows(
            caches=torch.from_numpy(plan.caches[rows]),
            seat=torch.from_numpy(plan.seat[rows]),
            owner=torch.from_numpy(plan.owner[rows]),
            similarity_threshold=self.method.similarity_threshold,
            refresh_interval=self.method.refresh_interval,
            counts=self.counts,
        )


def _fixed_counts(plan: SelectionPlan, method: Method) -> npt.NDArray[np.int64]:
    counted = (plan.seat != NO_SEAT) & ~plan.caches
    counts = np.zeros(len(Counter), np.int64)
    counts[Counter.RESELECTED] = (counted & ~plan.dense).sum()
    counts[Counter.DENSE] = (counted & plan.dense).sum()
    counts[Counter.ATTENDED] = plan.num_attended(method)[counted].sum()
    counts[Counter.CONTEXT] = plan.num_in_context()[counted].sum()
    return counts
