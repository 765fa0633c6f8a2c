"""One layer of one step on a CPU: decide -> score -> vote -> build the table -> finish -> attend.

One way for prompt chunks, the prompt's tail and generated tokens. Source of the method: TokenSelect,
arXiv 2411.02886, sections 3.2 and 3.3.

The order stands in compiled code, as the verbs do (`verbs.py`). In decoding a layer takes a fraction of a
millisecond, and five calls from Python would be a third of it. So rows of one query are one call; where
heads in several processes add up their votes, it is cut behind the vote. Rows of several queries ask with
their mean query, reuse nothing, and attend by a library. `_select_by_means` calls the same kernels for
them one by one: to compile the order once more, for these fp32 queries, would make the first start about
a seventh slower.

Compiled code knows what it gets by name. But numba takes a microsecond more for each named tuple that comes
from Python (1.6 instead of 0.7, with five arrays in it), so plain ones are handed over and named inside.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import get_num_threads

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu import verbs
from vllm_tokenselect.cpu.attention import RowAttention
from vllm_tokenselect.cpu.layer import CpuLayer
from vllm_tokenselect.cpu.rows import RowGroup, step_rows
from vllm_tokenselect.cpu.verbs import StepArrays
from vllm_tokenselect.kernels.cpu_arrays import (
    LayerArrays,
    Queries,
    int32_array,
    locate_tokens,
    with_whole_tokens,
)
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.reference import rotate
from vllm_tokenselect.kernels.score.cpu import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.state import SELECTS
from vllm_tokenselect.kernels.vote.cpu import soft_vote
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.settings import Method


@compile_once()
def _run_rows(asking, layer, rows, shared, out):
    """Rows of one query that select, from their queries to their outputs."""
    reused_end, selecting, votes = _find_votes(asking, asking, layer, rows, shared)
    _fill_table(reused_end, selecting, votes, layer, rows, shared)
    verbs.attend(asking, layer, rows, shared, out)


@compile_once()
def _find_votes(asking, deciding, layer, rows, shared):
    """Decide which rows select, score their candidates, and vote.

    Returns:
        int32 [R], where the candidates of the selection ended that a row reuses, `SELECTS` for one that
        selects; int64 [n], the rows that select; fp32 [n, N], their votes.
    """
    layer, group, shared = LayerArrays(*layer), RowGroup(*rows), StepArrays(*shared)
    reused_end = verbs.decide(Queries(*deciding), layer, group, shared)
    selecting = np.flatnonzero(reused_end == SELECTS)
    if len(selecting) == 0:
        return reused_end, selecting, np.empty((0, 0), np.float32)
    scores = verbs.score(selecting, Queries(*asking), layer, group, shared)
    return reused_end, selecting, verbs.vote(scores)


@compile_once()
def _fill_table(reused_end, selecting, votes, layer, rows, shared):
    """Build the table of the rows that select, and finish it by those that reuse a selection."""
    layer, group, shared = LayerArrays(*layer), RowGroup(*rows), StepArrays(*shared)
    if len(selecting) > 0:
        verbs.build_table(selecting, votes, group, shared)
    verbs.finish(reused_end, layer, group, shared)


class CpuStep:
    """What the layers of one step share.

    Args:
        groups: rows of the step.
        block_table: int32 [S, W], KV blocks of each request.
        block_size: tokens of a KV block.
        method: the settings.
        counters: int64 [len(Counter)], which every layer adds to.
        fixed_counts: int64 [2, len(Counter)], what a layer adds for rows outside the Selection Cache: one
            that selects, and one that follows. None for nothing.
        heads: the processes whose heads vote together; None where a process votes for itself.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        block_table: torch.Tensor,
        block_size: int,
        method: Method,
        counters: torch.Tensor,
        fixed_counts: np.ndarray | None = None,
        heads: HeadGroup | None = None,
    ) -> None:
        # Starts numba's threads where nothing has yet: a kernel that calls parallel ones and comes from
        # a cache does not do so itself, and would crash.
        get_num_threads()
        self.groups = groups
        self.block_table = block_table
        self.block_size = block_size
        self.method = method
        self.heads = heads
        self.fixed_counts = fixed_counts
        self.counters = counters.numpy()
        self._blocks = int32_array(block_table)
        # Plain, as compiled code gets them in every layer.
        self._plain_groups = [tuple(group) for group in groups]
        self.shared = tuple(
            StepArrays(
                block_table=self._blocks,
                block_size=block_size,
                n_init=method.n_init,
                similarity_threshold=np.float32(method.similarity_threshold),
                refresh_interval=method.refresh_interval,
                counters=self.counters,
            )
        )

    @classmethod
    def of_plan(
        cls,
        plan: SelectionPlan,
        block_table: torch.Tensor,
        block_size: int,
        num_heads: int,
        method: Method,
        counters: torch.Tensor,
        workspace_bytes: int = 32 << 20,
        heads: HeadGroup | None = None,
    ) -> CpuStep:
        """The step of a plan; `num_heads` and `workspace_bytes` as in `step_rows`."""
        groups = step_rows(plan, block_table, block_size, num_heads, method, workspace_bytes)
        fixed_counts = np.empty((2, len(Counter)), np.int64)
        fixed_counts[:] = plan.fixed_counts(method)
        if method.shares_selections:
            fixed_counts[1] = plan.fixed_counts(method, follows=True)
        return cls(groups, block_table, block_size, method, counters, fixed_counts, heads)

    def run_layer(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        attention: RowAttention,
        out: torch.Tensor,
    ) -> None:
        """Select, or reuse selections, and attend.

        In a layer that follows an anchor, generated tokens attend to what the anchor has left in the table.

        Args:
            query: fp32, bf16 or fp16 [T, Hq, D], the layer's queries of this step.
            cache: of the layer, this step's keys and values written. Its selections follow the step.
            scale: scale of q . k.
            attention: attends rows of several queries.
            out: as `query`, written for every query of a row.

        Raises:
            TypeError: `out` is of another dtype than `query`.
        """
        self.run_kept_layer(query, CpuLayer(cache, scale, query.dtype), attention, out)

    def run_kept_layer(
        self, query: torch.Tensor, layer: CpuLayer, attention: RowAttention, out: torch.Tensor
    ) -> None:
        """`run_layer` of a layer that is kept from step to step."""
        follows = layer.cache.follows
        if self.fixed_counts is not None:
            self.counters += self.fixed_counts[int(follows)]
        query = with_whole_tokens(query)
        num_heads = query.shape[1]
        attended = out.contiguous()
        asking, written = locate_tokens(query, layer.dtype), locate_tokens(attended, layer.dtype)
        arrays = layer.arrays()
        for group, rows in zip(self.groups, self._plain_groups, strict=True):
            selects = group.selects and not (follows and group.follows)
            if group.max_query_len > 1:
                if selects:
                    self._select_by_means(group, query, layer)
                attention(query, layer.cache, group, layer.scale, attended)
                continue
            queries = (*asking, group.query_start, num_heads, layer.num_kv_heads)
            if selects and self.heads is None:
                _run_rows(queries, arrays, rows, self.shared, written)
                continue
            if selects and self.heads is not None:
                self._select_together(self.heads, group, query, queries, layer)
            verbs.attend(queries, arrays, rows, self.shared, written)
        if attended is not out:
            out.copy_(attended)

    def _select_by_means(self, group: RowGroup, query: torch.Tensor, layer: CpuLayer) -> None:
        """Fill the table of rows of several queries, which ask with their mean query."""
        means = torch.stack(  # fp32 [R, Hq, D]
            [
                query[start : start + length].mean(dim=0, dtype=torch.float32)
                for start, length in zip(group.query_start, group.query_len, strict=True)
            ]
        )
        rotation = layer.cache.rotation
        if rotation is not None:
            means = rotate(means, rotation.vote[None])
        scores = score_paged_keys(
            means,
            layer.cache.pages,
            self.block_table,
            torch.from_numpy(group.row_seq),
            self.method.n_init,
            torch.from_numpy(group.candidate_end),
            layer.scale,
        )
        votes = soft_vote(scores)
        if self.heads is not None:
            votes = self.heads.sum_votes(votes)
        group.build_table(
            votes.contiguous().numpy(), self._blocks, self.block_size, self.method.n_init
        )

    def _select_together(
        self,
        heads: HeadGroup,
        group: RowGroup,
        query: torch.Tensor,
        asking: tuple[Any, ...],
        layer: CpuLayer,
    ) -> None:
        """Fill the table of rows of one query whose votes are those of several processes."""
        deciding = asking
        if group.caches.any():  # nothing is compared where no row takes part
            tokens = np.arange(group.num_rows, dtype=np.int32)
            query = heads.gather_heads(query[torch.from_numpy(group.query_start).long()])
            located = locate_tokens(query, layer.dtype)
            deciding = (*located, tokens, query.shape[1], heads.num_kv_heads)
        rows, arrays = tuple(group), layer.arrays()
        reused_end, selecting, votes = _find_votes(asking, deciding, arrays, rows, self.shared)
        if len(selecting):
            votes = heads.sum_votes(torch.from_numpy(votes)).numpy()
        _fill_table(reused_end, selecting, votes, arrays, rows, self.shared)
