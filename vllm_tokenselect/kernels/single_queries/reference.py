"""Readable definition of a layer's work for rows of one query, out of the other operations."""

from __future__ import annotations

import torch

from vllm_tokenselect.kernels.attend.reference import attend_single_queries
from vllm_tokenselect.kernels.block_table.reference import build_sparse_block_table
from vllm_tokenselect.kernels.rotate.reference import rotate
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.score.reference import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.reference import count_rows, decide, finish
from vllm_tokenselect.kernels.selection_cache.state import SELECTS, SelectionCacheState
from vllm_tokenselect.kernels.single_queries.rows import CachingRows, Layer, SingleQueryRows
from vllm_tokenselect.kernels.vote.reference import soft_vote


def single_queries(rows: SingleQueryRows) -> Layer:
    """Prepare rows of one query for all layers of a step."""

    def layer(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        state: SelectionCacheState | None,
        rotation: Rotation | None,
        sinks: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        caching = rows.caching
        if rows.selects and caching is not None and state is not None:
            _select_or_reuse(rows, caching, query, kv_cache, scale, state, rotation)
        elif rows.selects:
            _select(rows, torch.arange(len(rows.query_index)), query, kv_cache, scale, rotation)
        cos_sin = None if rotation is None else rotation.cos_sin
        attend_single_queries(
            query,
            rows.query_index,
            kv_cache,
            rows.slots,
            rows.lengths,
            scale,
            out,
            cos_sin,
            sinks,
            soft_cap,
        )

    return layer


def _select_or_reuse(
    rows: SingleQueryRows,
    caching: CachingRows,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    state: SelectionCacheState,
    rotation: Rotation | None,
) -> None:
    deciding, index, num_kv_heads = query, rows.query_index, kv_cache.shape[1]
    if rows.heads is not None:
        deciding, num_kv_heads = (
            rows.heads.gather_heads(query[index.long()]),
            rows.heads.num_kv_heads,
        )
        index = torch.arange(len(index))
    reused_ends = decide(
        deciding,
        num_kv_heads,
        index,
        caching.caches,
        caching.seat,
        caching.owner,
        rows.candidate_ends,
        caching.similarity_threshold,
        caching.refresh_interval,
        state,
    )
    selecting = (reused_ends == SELECTS).nonzero()[:, 0]
    if len(selecting):
        _select(rows, selecting, query, kv_cache, scale, rotation)
    finish(
        reused_ends,
        caching.caches,
        caching.seat,
        rows.block_table,
        rows.row_seq,
        rows.n_init,
        rows.top_k,
        rows.context_ends,
        rows.block_size,
        state,
        rows.slots,
        rows.lengths,
    )
    count_rows(
        torch.where(caching.caches, caching.seat, -1),
        torch.ones_like(caching.seat),
        reused_ends == SELECTS,
        reused_ends,
        rows.context_ends,
        rows.lengths,
        caching.counts,
    )


def _select(
    rows: SingleQueryRows,
    which: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    rotation: Rotation | None,
) -> None:
    table, ends = (rows.block_table, rows.row_seq[which], rows.n_init), rows.candidate_ends[which]
    queries = query[rows.query_index[which].long()].float()
    if rotation is not None:
        queries = rotate(queries, rotation.vote[None])
    slots, lengths = rows.slots[which], rows.lengths[which]
    votes = soft_vote(score_paged_keys(queries, kv_cache, *table, ends, scale))
    build_sparse_block_table(
        votes if rows.heads is None else rows.heads.sum_votes(votes),
        *table,
        rows.top_k[which],
        ends,
        rows.context_ends[which],
        rows.block_size,
        slots,
        lengths,
    )
    rows.slots[which], rows.lengths[which] = slots, lengths
