"""Rows of few queries by a kernel of our own, all others by a library.

A decoding step's rows have one query each, or a few with drafts, and a few thousand scattered tokens. A
library that is made for them takes several launches, or a copy of the tokens; the own kernel takes one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vllm_tokenselect.gpu.attention import RowAttention
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.kernels.attend.gpu import AttendScratch, attend_rows, queries_per_launch
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.layer_cache import LayerCache

# Every query of a row reads the row's tokens for itself. Most rows of a step with drafts have one all the
# same.
FEW_QUERIES = 8


def make_scratch(limits: StepLimits, head_size: int, device: torch.device) -> AttendScratch:
    """Scratch of the own kernel, for layers of a shape."""
    heads = limits.num_heads, limits.num_kv_heads
    return AttendScratch(limits.table_rows, limits.table_width, *heads, head_size, device)


def count_attending(limits: StepLimits, head_size: int, num_queries: int) -> int:
    """Launches of the own kernel for so many queries of a group."""
    rows, width = limits.table_rows, limits.table_width
    return -(-num_queries // queries_per_launch(rows, width, limits.num_heads, head_size))


class DecodingAttention:
    """Attends rows of few queries by the own kernel, whichever rows stand beside them.

    Args:
        library: for rows of more queries.
        scratch: shared by layers.
        few: most queries of a row for the own kernel; no fewer than a captured step's rows may have, whose
            lengths the host does not know.
        soft_cap: of the logits; 0 for none.
    """

    def __init__(
        self,
        library: RowAttention,
        scratch: AttendScratch,
        few: int = FEW_QUERIES,
        soft_cap: float = 0.0,
    ) -> None:
        self.library = library
        self.scratch = scratch
        self.few = few
        self.soft_cap = soft_cap
        self.name = library.name
        self.in_place = library.in_place
        self.buffer_bytes = library.buffer_bytes + scratch.num_bytes
        self.scratch_bytes = library.scratch_bytes

    def takes(self, pages: torch.Tensor) -> bool:
        return self.library.takes(pages)

    def parts(self, group: RowGroup) -> Sequence[RowGroup]:
        if group.max_query_len <= self.few:
            return (group,)
        parts, first = [], 0
        for _, rows in itertools.groupby(group.query_lens <= self.few):
            last = first + len(list(rows))
            parts.append(group.part(first, last))
            first = last
        return parts

    def rotates(self, group: RowGroup) -> bool:
        return group.max_query_len <= self.few

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        table: SparseBlockTable,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if group.max_query_len > self.few:
            self.library(query, cache, group, table, scale, out)
            return
        attend_rows(
            query,
            group.query_start_loc,
            group.max_query_len,
            cache.pages,
            table.slots,
            table.lengths,
            group.max_length,
            scale,
            self.scratch,
            out,
            cos_sin=None if cache.rotation is None else cache.rotation.cos_sin,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
            sinks=cache.sinks,
            soft_cap=self.soft_cap,
        )
