"""Rows of a plan -> sparse block table: which cached tokens every row attends to.

    mean query -> score -> soft vote -> top-k -> sparse block table

One way for prompt chunks, the prompt's tail and generated tokens. Source of the method: TokenSelect,
arXiv 2411.02886, sections 3.2 and 3.3.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.kernels.operations import Operations
from vllm_tokenselect.plan import SelectionPlan

# Scores of the rows that are voted on together: they must fit the processor's caches better than
# they fit memory, and a million-token context must not need gigabytes of them.
SCORE_WORKSPACE_BYTES = 32 << 20


class StepSelection:
    """The sparse block table of one step, and what is needed to fill it layer by layer.

    Rows that see their whole context get their entries here, once a step; the others in `select`,
    once a layer.

    Args:
        plan: rows of the step.
        block_table: int32 [S, W], KV blocks of each request of the batch.
        block_size: tokens of a KV block.
        num_heads: query heads of a layer.
        config: the settings.
        operations: the implementation to use.

    Attributes:
        slots: int32 [R, width], block table of page size 1, ascending by position.
        lengths: int32 [R], entries of each row.
    """

    def __init__(
        self,
        plan: SelectionPlan,
        block_table: torch.Tensor,
        block_size: int,
        num_heads: int,
        config: TokenSelectConfig,
        operations: Operations,
    ) -> None:
        self.plan = plan
        self.block_table = block_table
        self.block_size = block_size
        self.config = config
        self.operations = operations
        self.row_seq = torch.from_numpy(plan.row_seq)
        self.candidate_end = torch.from_numpy(plan.candidate_end)
        self.chunk_end = torch.from_numpy(plan.chunk_end)
        lengths = np.where(
            np.arange(plan.num_rows) < plan.num_dense,
            plan.chunk_end,
            config.n_init + config.top_k + plan.chunk_end - plan.candidate_end,
        ).astype(np.int32)
        width = int(lengths.max(initial=0))
        self.slots = torch.empty((plan.num_rows, width), dtype=torch.int32)
        self.lengths = torch.from_numpy(lengths)
        self.groups = self._group_rows(num_heads)
        if plan.num_dense:
            self._fill(slice(0, plan.num_dense), votes=None)
        self.query_start = torch.from_numpy(plan.query_start.astype(np.int64))

    def select(self, query: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> None:
        """Fill the table's rows that select, for one layer.

        Args:
            query: [T, Hq, D], the layer's queries of this step.
            kv_cache: [num_blocks, Hkv, 2, block_size, D].
            scale: the attention's own scale of q . k.
        """
        for rows in self.groups:
            logits = self.operations.score_paged_keys(
                self._mean_query(query, rows),
                kv_cache,
                self.block_table,
                self.row_seq[rows],
                self.config.n_init,
                self.candidate_end[rows],
                scale,
            )
            self._fill(rows, votes=self.operations.soft_vote(logits))

    def _fill(self, rows: slice, votes: torch.Tensor | None) -> None:
        self.operations.build_sparse_block_table(
            votes,
            self.block_table,
            self.row_seq[rows],
            self.config.n_init,
            self.config.top_k,
            self.candidate_end[rows],
            self.chunk_end[rows],
            self.block_size,
            self.slots[rows],
            self.lengths[rows],
        )

    def _mean_query(self, query: torch.Tensor, rows: slice) -> torch.Tensor:
        """Mean query of each row, fp32 [rows, Hq, D]."""
        if self.plan.query_len[rows.start] == 1:
            return query[self.query_start[rows]].float()
        starts, lens = self.plan.query_start[rows], self.plan.query_len[rows]
        return torch.stack(
            [
                query[start : start + length].mean(dim=0, dtype=torch.float32)
                for start, length in zip(starts, lens, strict=True)
            ]
        )

    def _group_rows(self, num_heads: int) -> list[slice]:
        """Cut the selecting rows into groups whose scores fit the workspace.

        A group holds rows of one query or rows of several, never both.
        """
        plan = self.plan
        groups: list[slice] = []
        first, most = plan.num_dense, 0
        for row in range(plan.num_dense, plan.num_rows):
            candidates = int(plan.candidate_end[row]) - self.config.n_init
            most = max(most, candidates)
            too_large = 4 * num_heads * most * (row - first + 1) > SCORE_WORKSPACE_BYTES
            other_kind = (plan.query_len[row] == 1) != (plan.query_len[first] == 1)
            if row > first and (too_large or other_kind):
                groups.append(slice(first, row))
                first, most = row, candidates
        if first < plan.num_rows:
            groups.append(slice(first, plan.num_rows))
        return groups
