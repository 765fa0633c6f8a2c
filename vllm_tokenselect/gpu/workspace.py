"""The buffers of a step. Layers run one after the other: all layers of a shape share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.device_memory import make_lasting
from vllm_tokenselect.gpu.limits import MAX_GROUP_ROWS, StepLimits
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.block_table.gpu import TableScratch
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.score.gpu import NUM_PARTS, Scores

# Entries between the lengths of kept lines: those of a group begin at a multiple of 16 bytes, whichever
# row is its first, so that one compiled kernel fits all of them.
LENGTH_STEP = 4


@dataclass(frozen=True)
class ScoreBuffers:
    """Views of the workspace for the rows of a group; see `score_paged_keys` and `soft_vote`."""

    mean_queries: torch.Tensor
    scores: Scores


class KeptLines:
    """Lines of the sparse block table that anchors leave to the layers that follow them in a step.

    Args:
        limits: of the steps; without lines where no layer follows another.
        device: where they lie.
    """

    def __init__(self, limits: StepLimits, device: torch.device) -> None:
        self.slots = torch.empty(limits.kept_entries, dtype=torch.int32, device=device)
        self.lengths = torch.empty(LENGTH_STEP * limits.kept_rows, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        return int(self.slots.nbytes + self.lengths.nbytes)

    def of(self, group: RowGroup) -> SparseBlockTable:
        """The lines of a group that follows, which are those of its rows in the step."""
        first, rows, width = group.first, group.num_rows, group.table_width
        slots = self.slots[first * width :][: rows * width].view(rows, width)
        return SparseBlockTable(slots, self.lengths[LENGTH_STEP * first :][:rows])


class Workspace:
    """Allocated once, before a server measures what memory is left for the KV cache.

    Args:
        limits: of the steps; steps whose contexts are shorter fit too.
        head_size: of a layer.
        device: where the buffers lie.
        counters: int64 [len(Counter)] on the device, added to by every layer. Zeros of its own when None.
        dtype: of the queries; only needed where positions are reassigned.
        heads: the processes whose heads vote together; None where a process votes for itself.
        kept: what layers share between them; lines of its own when None.

    Attributes:
        slots, lengths: of the sparse block table, see `table_of`.
        rotated_queries: [max_tokens, Hq, D]; empty where positions are native.
        row_numbers: int32 [MAX_GROUP_ROWS], 0, 1, 2 ...
    """

    def __init__(
        self,
        limits: StepLimits,
        head_size: int,
        device: torch.device,
        counters: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        heads: HeadGroup | None = None,
        kept: KeptLines | None = None,
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.limits = limits
        self.heads = heads
        rows, num_heads = MAX_GROUP_ROWS, limits.num_heads
        self.slots = empty(limits.table_entries, dtype=torch.int32)
        self.lengths = empty(rows, dtype=torch.int32)
        self.kept = kept or KeptLines(limits, device)
        self.mean_queries = empty(rows, num_heads, head_size)
        self.parts = empty(2, rows, num_heads, NUM_PARTS)
        self.scores = empty(limits.score_bytes // 4)
        tokens = limits.max_tokens if limits.method.reassigns_positions else 0
        self.rotated_queries = empty(tokens, num_heads, head_size, dtype=dtype)
        self.row_numbers = make_lasting(
            lambda: torch.arange(rows, dtype=torch.int32, device=device)
        )
        self.table_scratch = TableScratch(limits.vote_columns, rows, device)
        if counters is None:
            counters = torch.zeros(len(Counter), dtype=torch.int64, device=device)
        self.counters = counters

    @property
    def num_bytes(self) -> int:
        scoring = (self.mean_queries, self.parts, self.scores, self.rotated_queries)
        return sum(t.nbytes for t in (*scoring, self.row_numbers)) + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """What the sparse block table takes, and what builds it."""
        own = int(self.slots.nbytes + self.lengths.nbytes) + self.table_scratch.num_bytes
        return own + self.kept.num_bytes

    def table_of(self, group: RowGroup) -> SparseBlockTable:
        """The group's lines of the sparse block table: kept for the step, or for the layer alone."""
        if group.follows:
            return self.kept.of(group)
        rows, width = group.num_rows, group.table_width
        return SparseBlockTable(self.slots[: rows * width].view(rows, width), self.lengths[:rows])

    def votes(self, group: RowGroup) -> torch.Tensor:
        """Votes of the group's columns, fp32: before its scores, if these are stored."""
        limits = group.limits
        return self.scores[: limits.vote_columns if group.rescores else limits.score_columns]

    def for_scores(self, group: RowGroup) -> ScoreBuffers:
        """Views for the scores of a group that has candidates."""
        num_heads, num_columns = group.limits.num_heads, group.limits.score_columns
        logits = None
        if not group.rescores:
            logits = self.scores[num_columns:][: num_heads * num_columns]
            logits = logits.view(num_heads, num_columns)
        maxima, sums = self.parts[:, : group.num_rows]
        return ScoreBuffers(
            mean_queries=self.mean_queries[: group.num_rows],
            scores=Scores(
                logits=logits,
                columns=group.columns,
                maxima=maxima,
                sums=sums,
                start=group.limits.method.n_init,
                ends=group.scored_end,
            ),
        )
