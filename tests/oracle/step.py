"""A layer of a step in readable PyTorch, out of each kernel's reference: the tests' order of the steps."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from vllm_tokenselect.cpu.attention import GatheredAttention, RowAttention
from vllm_tokenselect.cpu.rows import RowGroup
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.attend.reference import (
    attend_single_queries,
    attention_weights,
    cap_scores,
)
from vllm_tokenselect.kernels.block_table.reference import build_sparse_block_table
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.mean_query.reference import mean_queries
from vllm_tokenselect.kernels.rotate.reference import rotate
from vllm_tokenselect.kernels.score.reference import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.reference import count_rows, decide, finish
from vllm_tokenselect.kernels.selection_cache.state import SELECTS
from vllm_tokenselect.kernels.vote.reference import soft_vote


class ReferenceStep(CpuStep):
    """As a `CpuStep`, which also makes its rows."""

    def run_layer(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        attention: RowAttention,
        out: torch.Tensor,
    ) -> None:
        if self.fixed_counts is not None:
            self.counters += self.fixed_counts[1 if cache.follows else 0]
        for group in self.groups:
            if group.selects and not (cache.follows and group.follows):
                reused_end = self.decide(group, query, cache)
                selecting = (reused_end == SELECTS).nonzero()[:, 0]
                if len(selecting):
                    votes = self.score_and_vote(group, selecting, query, cache, scale)
                    self.build_table(group, selecting, votes)
                self.finish(group, reused_end, cache)
            if group.max_query_len == 1:
                self.attend(group, query, cache, scale, out)
            else:
                attention(query, cache, group, scale, out)

    def decide(self, group: RowGroup, query: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        caches, candidate_end, index = map(
            torch.from_numpy, (group.caches, group.candidate_end, group.query_start)
        )
        if cache.selections is None or not caches.any():
            return torch.full_like(candidate_end, SELECTS)
        num_kv_heads = cache.pages.shape[1]
        if self.heads is not None:
            query, num_kv_heads = (
                self.heads.gather_heads(query[index.long()]),
                self.heads.num_kv_heads,
            )
            index = torch.arange(len(index))
        return decide(
            query,
            num_kv_heads,
            index,
            caches,
            torch.from_numpy(group.seat),
            torch.from_numpy(group.owner),
            candidate_end,
            self.method.similarity_threshold,
            self.method.refresh_interval,
            cache.selections,
        )

    def score_and_vote(
        self,
        group: RowGroup,
        selecting: torch.Tensor,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
    ) -> torch.Tensor:
        query_start, query_len = map(torch.from_numpy, (group.query_start, group.query_len))
        means = mean_queries(query, query_start[selecting], query_len[selecting])
        if cache.rotation is not None:
            means = rotate(means, cache.rotation.vote[None])
        scores = score_paged_keys(
            means,
            cache.pages,
            self.block_table,
            torch.from_numpy(group.row_seq)[selecting],
            self.method.n_init,
            torch.from_numpy(group.candidate_end)[selecting],
            scale,
        )
        votes = soft_vote(scores)
        return votes if self.heads is None else self.heads.sum_votes(votes)

    def build_table(self, group: RowGroup, selecting: torch.Tensor, votes: torch.Tensor) -> None:
        slots, lengths = torch.from_numpy(group.slots), torch.from_numpy(group.lengths)
        own_slots, own_lengths = slots[selecting], lengths[selecting]
        build_sparse_block_table(
            votes,
            self.block_table,
            torch.from_numpy(group.row_seq)[selecting],
            self.method.n_init,
            torch.from_numpy(group.top_k)[selecting],
            torch.from_numpy(group.candidate_end)[selecting],
            torch.from_numpy(group.context_end)[selecting],
            self.block_size,
            own_slots,
            own_lengths,
        )
        slots[selecting], lengths[selecting] = own_slots, own_lengths

    def finish(self, group: RowGroup, reused_end: torch.Tensor, cache: LayerCache) -> None:
        if cache.selections is None:
            return
        caches, seat, context_end, lengths = map(
            torch.from_numpy, (group.caches, group.seat, group.context_end, group.lengths)
        )
        finish(
            reused_end,
            caches,
            seat,
            self.block_table,
            torch.from_numpy(group.row_seq),
            self.method.n_init,
            torch.from_numpy(group.top_k),
            context_end,
            self.block_size,
            cache.selections,
            torch.from_numpy(group.slots),
            lengths,
        )
        count_rows(
            torch.where(caches, seat, -1),
            torch.ones_like(seat),
            reused_end == SELECTS,
            reused_end,
            context_end,
            lengths,
            torch.from_numpy(self.counters),
            cache.followers,
        )

    def attend(
        self,
        group: RowGroup,
        query: torch.Tensor,
        cache: LayerCache,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        attend_single_queries(
            query,
            torch.from_numpy(group.query_start),
            cache.pages,
            torch.from_numpy(group.slots),
            torch.from_numpy(group.lengths),
            scale,
            out,
            None if cache.rotation is None else cache.rotation.cos_sin,
            cache.sinks,
            cache.soft_cap,
        )


def sdpa(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    soft_cap: float,
    out: torch.Tensor,
) -> None:
    """A `LibraryAttention`: PyTorch's, or the definition where there are sinks or a cap."""
    n, m = len(query), len(keys)
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if sinks is None and not soft_cap:
        query, keys, values = (part.transpose(0, 1)[None] for part in (query, keys, values))
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
        out.copy_(attend(query, keys, values, scale=scale)[0].transpose(0, 1))
        return
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("nhd,mhd->hnm", query.float(), keys) * scale
    weights = attention_weights(cap_scores(scores, soft_cap), mask, sinks)
    out.copy_(torch.einsum("hnm,mhd->nhd", weights, values))


def sdpa_attention(cache: LayerCache, max_tokens: int) -> GatheredAttention:
    """Attention by `sdpa`, for rows of at most so many tokens."""
    _, num_kv_heads, _, _, head_size = cache.pages.shape
    return GatheredAttention(sdpa, num_kv_heads, head_size, cache.pages.dtype, max_tokens)
