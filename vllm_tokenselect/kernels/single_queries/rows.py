"""What a step knows of its rows of one query, for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
        seat: int32 [R], the line of the state that is the request's.
        owner: int32 [R], which owner of that line the request is.
        similarity_threshold, refresh_interval: the settings.
        counts: int64 [len(Counter)], added to for rows that do.
    """

    caches: torch.Tensor
    seat: torch.Tensor
    owner: torch.Tensor
    similarity_threshold: float
    refresh_interval: int
    counts: torch.Tensor


class Layer(Protocol):
    """The work of a layer for such rows."""

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        state: SelectionCacheState | None,
        rotation: Rotation | None,
        sinks: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        """Fill the rows' lines of the table if they select, each anew or out of the cache, and attend.

        Args:
            query: [T, Hq, D].
            kv_cache: [num_blocks, Hkv, 2, block_size, D].
            scale: of q . k.
            out: [T, Hq, D], written where the rows are.
            state: the layer's part of the Selection Cache, if there is one.
            rotation: the layer's, if positions are reassigned.
            sinks: [Hq], a logit of each head in the softmax's denominator; votes have none.
            soft_cap: of the attention's scores, `cap * tanh(score / cap)`, 0 for none; votes have none.
        """
