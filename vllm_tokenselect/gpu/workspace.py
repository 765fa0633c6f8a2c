"""The buffers of a step, shared by all layers of a shape, since layers run one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_tokenselect.gpu.rows import RowGroup, StepLimits
from vllm_tokenselect.kernels.block_table.gpu import TableScratch
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.score.gpu import MAX_SPLITS, choose_splits


@dataclass(frozen=True)
class ScoreBuffers:
    """Views of the workspace for one group of rows; see `score_paged_keys` and `soft_vote`."""

    mean_queries: torch.Tensor
    logits: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
    votes: torch.Tensor


class Workspace:
    """Allocated once, before a server measures what memory is left for the KV cache.

    Args:
        limits: of the steps.
        head_size: of a layer.
        device: where the buffers lie.
        counters: int64 [5] on the device, added to by every layer: rows that selected, reused a
            selection, and saw their whole context; tokens that were attended, and tokens in context.
            Zeros of its own when None.
        dtype: of the queries; needed where positions are reassigned only.
        heads: the processes whose heads vote together; None where a process votes for itself.

    Attributes:
        slots: int32 [table_rows, table_width], the sparse block table of a group.
        lengths: int32 [table_rows], entries of each row.
        rotated_queries: [max_tokens, Hq, D]; of no tokens where positions are the model's own.
        row_numbers: int32 [table_rows], 0, 1, 2 ...
    """

    def __init__(
        self,
        limits: StepLimits,
        head_size: int,
        device: torch.device,
        counters: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        heads: HeadGroup | None = None,
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.limits = limits
        self.heads = heads
        rows, num_heads = limits.table_rows, limits.num_heads
        self.slots = empty(rows, limits.table_width, dtype=torch.int32)
        self.lengths = empty(rows, dtype=torch.int32)
        self.mean_queries = empty(rows, num_heads, head_size)
        self.parts = empty(2, rows * num_heads * MAX_SPLITS)
        self.scores = empty(limits.score_bytes // 4)
        tokens = limits.max_tokens if limits.method.reassigns_positions else 0
        self.rotated_queries = empty(tokens, num_heads, head_size, dtype=dtype)
        self.row_numbers = torch.arange(rows, dtype=torch.int32, device=device)
        self.table_scratch = TableScratch(rows, device)
        if counters is None:
            counters = torch.zeros(5, dtype=torch.int64, device=device)
        self.counters = counters

    @property
    def num_bytes(self) -> int:
        tensors = (
            *(self.slots, self.lengths, self.mean_queries, self.parts, self.scores),
            *(self.rotated_queries, self.row_numbers),
        )
        return sum(t.nbytes for t in tensors) + self.table_scratch.num_bytes

    def for_scores(self, group: RowGroup) -> ScoreBuffers:
        """Views for the scores of a group that has candidates."""
        rows, heads, width = group.num_rows, self.limits.num_heads, group.width
        most_tiles = max(len(tiles.table) for tiles in group.tiles)
        splits = choose_splits(most_tiles, self.limits.num_kv_heads, width)
        num_scores = rows * heads * width
        parts = self.parts[:, : rows * heads * splits].view(2, rows, heads, splits)
        return ScoreBuffers(
            mean_queries=self.mean_queries[:rows],
            logits=self.scores[:num_scores].view(rows, heads, width),
            maxima=parts[0],
            sums=parts[1],
            votes=self.scores[num_scores : num_scores + rows * width].view(rows, width),
        )
