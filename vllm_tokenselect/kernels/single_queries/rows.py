"""What a step knows of its rows of one query, for all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState


@dataclass(frozen=True)
class SingleQueryRows:
    """Rows of one query.

    Attributes:
        query_index: int32 [R], the token of the step that each row is.
        block_table, ..., lengths: as `build_sparse_block_table` takes them.
        selects: whether the rows have more than `top_k` candidates, all of them. If not, their lines
            of `slots` and `lengths` must be filled already, and are only read.
        caching: how the rows take part in the Selection Cache; None if none does.
        heads: the processes whose heads vote together; None where a process votes for itself.
    """

    query_index: torch.Tensor
    block_table: torch.Tensor
    row_seq: torch.Tensor
    n_init: int
    top_k: torch.Tensor
    candidate_ends: torch.Tensor
    context_ends: torch.Tensor
    block_size: int
    slots: torch.Tensor
    lengths: torch.Tensor
    selects: bool
    caching: CachingRows | None = None
    heads: HeadGroup | None = None


@dataclass(frozen=True)
class CachingRows:
    """How rows take part in the Selection Cache; those of one request in order of position.

    Attributes:
        caches: bool [R], which of the rows do.
        slot: int32 [R], the line of the state that is the request's.
        owner: int32 [R], which owner of that line the request is.
        similarity_threshold, refresh_interval: the settings.
        counts: int64 [5], the counters of `vllm_tokenselect.counters`, added to for rows that do.
    """

    caches: torch.Tensor
    slot: torch.Tensor
    owner: torch.Tensor
    similarity_threshold: float
    refresh_interval: int
    counts: torch.Tensor


# query [T, Hq, D], kv_cache, scale, out [T, Hq, D], the layer's state, its rotation.
Layer = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        float,
        torch.Tensor,
        SelectionCacheState | None,
        Rotation | None,
    ],
    None,
]
