"""The operations of a step, as one set for each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_tokenselect.kernels.single_queries.rows import Layer, SingleQueryRows


@dataclass(frozen=True)
class Operations:
    """Implementations that belong together; each folder's `reference` documents its operation."""

    score_paged_keys: Callable[..., torch.Tensor]
    soft_vote: Callable[..., torch.Tensor]
    build_sparse_block_table: Callable[..., None]
    gather_tokens: Callable[..., object]
    single_queries: Callable[[SingleQueryRows], Layer]


def reference_operations() -> Operations:
    """Readable PyTorch, for tests and for comparison."""
    from vllm_tokenselect.kernels.block_table.reference import build_sparse_block_table
    from vllm_tokenselect.kernels.gather.reference import gather_tokens
    from vllm_tokenselect.kernels.score.reference import score_paged_keys
    from vllm_tokenselect.kernels.single_queries.reference import single_queries
    from vllm_tokenselect.kernels.vote.reference import soft_vote

    return Operations(
        score_paged_keys,
        soft_vote,
        build_sparse_block_table,
        gather_tokens,
        single_queries,
    )


def cpu_operations() -> Operations:
    """numba and PyTorch on a CPU. Imports numba."""
    from vllm_tokenselect.kernels.block_table.cpu import build_sparse_block_table
    from vllm_tokenselect.kernels.gather.cpu import gather_tokens
    from vllm_tokenselect.kernels.score.cpu import score_paged_keys
    from vllm_tokenselect.kernels.single_queries.cpu import single_queries
    from vllm_tokenselect.kernels.vote.cpu import soft_vote

    return Operations(
        score_paged_keys,
        soft_vote,
        build_sparse_block_table,
        gather_tokens,
        single_queries,
    )
