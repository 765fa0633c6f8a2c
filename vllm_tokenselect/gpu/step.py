"""One layer of one step on a GPU: decide -> score -> vote -> build the table -> finish -> attend.

Where requests have one row each, what scores a row decides for it too, and what writes its table finishes.

Every verb launches the same kernels whatever the rows are; a row that sees its whole context or reuses a
selection, or a padded one, is left out by the kernels themselves. Where positions are reassigned, queries
and keys come without their rotation: the mean queries are rotated for the vote, and the queries to attend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_tokenselect.gpu.attention import RowAttention
from vllm_tokenselect.gpu.rows import RowGroup
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.block_table.gpu import build_sparse_block_table
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.mean_query.gpu import mean_queries
from vllm_tokenselect.kernels.rotate.gpu import rotate_queries
from vllm_tokenselect.kernels.score.gpu import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.gpu import finish_rows
from vllm_tokenselect.kernels.selection_cache.gpu_decide import Decision, decide_rows
from vllm_tokenselect.kernels.selection_cache.gpu_table import build_finished_table
from vllm_tokenselect.kernels.vote.gpu import soft_vote
from vllm_tokenselect.kernels.vote.gpu_rescoring import vote_rescoring


class GpuStep:
    """What the layers of one step share.

    Args:
        groups: rows of the step.
        block_table: int32 [S, W], KV blocks of each request.
    """

    def __init__(self, groups: Sequence[RowGroup], block_table: torch.Tensor) -> None:
        self.groups = groups
        self.block_table = block_table

    def run_layer(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        workspace: Workspace,
        attention: RowAttention,
        out: torch.Tensor,
    ) -> None:
        """Select, or reuse selections, and attend.

        In a layer that follows an anchor, groups that follow only attend, to what the anchor has left.

        Args:
            query: fp32, bf16 or fp16 [T, Hq, D], the layer's queries of this step.
            cache: of the layer, this step's keys and values written. Its selections follow the step.
            scale: scale of q . k.
            workspace: overwritten; its counters are added to.
            attention: what attends.
            out: [T, Hq, D], written for every query of a row.
        """
        for group in self.groups:
            # A group is handed its own queries: what libraries allocate grows with how many they get.
            own, own_out = query[group.queries], out[group.queries]
            if not (cache.follows and group.follows):
                self.select(group, own, cache, scale, workspace)
            self.attend(group, own, cache, scale, workspace, attention, own_out)

    def select(
        self,
        group: RowGroup,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        workspace: Workspace,
    ) -> None:
        """Fill the group's lines of the sparse block table."""
        decision = self.decide(group, query, cache, workspace)
        if group.tiles:  # without them no row may select
            self.score(group, query, cache, scale, workspace, decision)
            self.vote(group, cache, scale, workspace)
        self.build_table(group, cache, workspace, decision)
        self.finish(group, cache, workspace)

    def decide(
        self, group: RowGroup, query: torch.Tensor, cache: LayerCache, workspace: Workspace
    ) -> Decision | None:
        """Decide which of the group's rows reuse a selection.

        Returns:
            What the programs that score a row decide by, where that spares a launch. None if all is
            decided.
        """
        if cache.selections is None or not len(group.chains):
            return None
        method, heads = workspace.limits.method, workspace.heads
        query_start, num_kv_heads = group.query_start_loc[:-1], workspace.limits.num_kv_heads
        if heads is not None:
            # Padded rows start behind the last query; whatever they gather is not looked at.
            query = heads.gather_heads(query[query_start.clamp(max=len(query) - 1)])
            query_start, num_kv_heads = workspace.row_numbers[: len(query)], heads.num_kv_heads
        decision = Decision(
            query,
            query_start,
            num_kv_heads,
            group,
            method.n_init,
            method.similarity_threshold,
            method.refresh_interval,
            cache.selections,
        )
        if group.tiles and group.single_rows and heads is None:
            return decision
        decide_rows(decision)
        return None

    def score(
        self,
        group: RowGroup,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        workspace: Workspace,
        decision: Decision | None = None,
    ) -> None:
        """Score the candidates of the group's rows with their mean queries.

        A row of one query is its own mean and asks with it where it lies. Otherwise one launch averages the
        queries of all rows, and rotates the means where positions are reassigned.
        """
        buffers = workspace.for_scores(group)
        asking = query
        starts: torch.Tensor | None = group.query_start_loc[:-1]
        if cache.rotation is not None or group.max_query_len > 1:
            mean_queries(
                query,
                group.query_start_loc[:-1],
                group.query_len,
                buffers.mean_queries,
                None if cache.rotation is None else cache.rotation.vote,
            )
            asking, starts = buffers.mean_queries, None
        for tiles in group.tiles:
            score_paged_keys(
                asking,
                cache.pages,
                self.block_table,
                tiles.table,
                tiles.rows_per_tile,
                scale,
                cache.key_scale,
                buffers.scores,
                starts,
                decision if tiles.rows_per_tile == 1 else None,
            )

    def vote(self, group: RowGroup, cache: LayerCache, scale: float, workspace: Workspace) -> None:
        """Turn the scores of the group into votes: those that were stored, or computed once more."""
        buffers, votes = workspace.for_scores(group), workspace.votes(group)
        if not group.rescores:
            # Votes that are summed with those of other processes have other exponents.
            exponents = workspace.table_scratch.exponents if workspace.heads is None else None
            soft_vote(buffers.scores, votes, exponents)
            return
        for tiles in group.tiles:
            vote_rescoring(
                buffers.mean_queries,
                cache.pages,
                self.block_table,
                tiles.table,
                tiles.rows_per_tile,
                scale,
                cache.key_scale,
                buffers.scores,
                votes,
            )

    def build_table(
        self,
        group: RowGroup,
        cache: LayerCache,
        workspace: Workspace,
        decision: Decision | None = None,
    ) -> None:
        """Fill the group's lines of the sparse block table, but for rows that reuse a selection.

        Where no request has several rows, the kernel that writes them does what `finish` does too.
        """
        votes = workspace.votes(group) if group.tiles else None  # without tiles no row may select
        if votes is not None and workspace.heads is not None:
            # Behind a row's candidates lies what was there before, and stays unread when summed.
            votes = workspace.heads.sum_votes(votes[: group.num_columns])
        table, scratch = workspace.table_of(group), workspace.table_scratch
        counted = workspace.heads is None and not group.rescores
        n_init, block_size = workspace.limits.method.n_init, cache.pages.shape[3]
        if _finishes_while_writing(group, cache):
            build_finished_table(
                votes,
                group.columns,
                self.block_table,
                group,
                n_init,
                block_size,
                table,
                scratch,
                counted,
                cache.selections,
                workspace.counters,
                _counted_followers(group, cache),
                decision,
            )
            return
        build_sparse_block_table(
            votes,
            group.columns,
            self.block_table,
            group.row_seq,
            n_init,
            group.top_k,
            group.scored_end,
            group.table_end,
            block_size,
            table.slots,
            table.lengths,
            scratch,
            counted,
        )

    def finish(self, group: RowGroup, cache: LayerCache, workspace: Workspace) -> None:
        """Fill in the rows that reuse a selection, remember the others', and count all."""
        if _finishes_while_writing(group, cache):
            return
        finish_rows(
            group,
            self.block_table,
            workspace.limits.method.n_init,
            cache.pages.shape[3],
            cache.selections,
            workspace.table_of(group),
            workspace.counters,
            _counted_followers(group, cache),
        )

    def attend(
        self,
        group: RowGroup,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        workspace: Workspace,
        attention: RowAttention,
        out: torch.Tensor,
    ) -> None:
        """Attend to what the workspace's sparse block table names."""
        table = workspace.table_of(group)
        for part in attention.parts(group):
            first = part.first - group.first
            rows = slice(first, first + part.num_rows)
            own = SparseBlockTable(table.slots[rows], table.lengths[rows])
            queries = slice(
                part.queries.start - group.queries.start, part.queries.stop - group.queries.start
            )
            asking = query[queries]
            if cache.rotation is not None and not attention.rotates(part):
                # `view_as` refuses a step that is longer than the buffer.
                rotated = workspace.rotated_queries[: len(asking)].view_as(asking)
                rotate_queries(
                    asking,
                    part.query_start_loc[:-1],
                    part.query_len,
                    part.max_query_len,
                    own.lengths,
                    cache.rotation.cos_sin,
                    rotated,
                )
                asking = rotated
            attention(asking, cache, part, own, scale, out[queries])


def _finishes_while_writing(group: RowGroup, cache: LayerCache) -> bool:
    """Whether no row reads what another one leaves in the Selection Cache."""
    return cache.selections is None or group.single_rows


def _counted_followers(group: RowGroup, cache: LayerCache) -> int:
    """Layers that an anchor counts too: for groups that follow, they launch nothing that could."""
    return cache.followers if group.follows else 0
