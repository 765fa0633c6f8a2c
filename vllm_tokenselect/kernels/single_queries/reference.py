"""Readable definition of a layer's work for rows of one query, out of the other operations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_tokenselect.kernels.attend.reference import attend_single_queries
from vllm_tokenselect.kernels.block_table.reference import build_sparse_block_table
from vllm_tokenselect.kernels.score.reference import score_paged_keys
from vllm_tokenselect.kernels.vote.reference import soft_vote

Layer = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], None]


def single_queries(
    query_index: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    n_init: int,
    top_k: int,
    candidate_ends: torch.Tensor,
    context_ends: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    selects: bool,
) -> Layer:
    """Prepare rows of one query for all layers of a step.

    Args:
        query_index: int32 [R], the token of the step that each row is.
        selects: whether the rows have more than `top_k` candidates, all of them. If not, their lines
            of `slots` and `lengths` must be filled already, and are only read.
        block_table, ..., lengths: as `build_sparse_block_table` takes them.

    Returns:
        `layer(query, kv_cache, scale, out)`: fills the rows' lines of the table for this layer if
        they select, and attends; `query` and `out` are [T, Hq, D].
    """

    def layer(query: torch.Tensor, kv_cache: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        if selects:
            logits = score_paged_keys(
                query[query_index.long()].float(),
                kv_cache,
                block_table,
                row_seq,
                n_init,
                candidate_ends,
                scale,
            )
            build_sparse_block_table(
                soft_vote(logits),
                block_table,
                row_seq,
                n_init,
                top_k,
                candidate_ends,
                context_ends,
                block_size,
                slots,
                lengths,
            )
        attend_single_queries(query, query_index, kv_cache, slots, lengths, scale, out)

    return layer
