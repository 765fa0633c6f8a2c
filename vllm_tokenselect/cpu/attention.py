"""Queries + sparse block table -> output on a CPU, for rows of several queries, by a library.

Every selected token precedes its row's own queries, so gathering a row's tokens in order of position and
attending with a causal mask aligned to the lower right is exact. Rows of one query attend in place.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_tokenselect.cpu.rows import RowGroup
from vllm_tokenselect.kernels.gather.cpu import gather_tokens
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.reference import rotate


class RowAttention(Protocol):
    """Attention over the sparse block table."""

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attend the rows of a group.

        Args:
            query: [T, Hq, D], the step's queries, not rotated where the cache's keys are not.
            cache: the layer's.
            group: its rows, with their table.
            scale: scale of q . k.
            out: [T, Hq, D], written for the rows' queries.
        """


class LibraryAttention(Protocol):
    """Causal attention of a library over contiguous keys and values."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
        soft_cap: float,
        out: torch.Tensor,
    ) -> None:
        """Attend with the mask aligned to the lower right: the last query sees every key.

        Args:
            query: [n, Hq, D].
            keys, values: [m, Hkv, D], m >= n.
            scale: scale of q . k.
            sinks: fp32 [Hq], of each head a logit in the denominator of its softmax; None for none.
            soft_cap: of the scores, `cap * tanh(score / cap)`; 0 for none.
            out: [n, Hq, D], written.
        """


class GatheredAttention:
    """Gathers the tokens of each row into a buffer, which a library attends to.

    Args:
        library: attends.
        num_kv_heads, head_size: of a layer.
        dtype: of the KV cache.
        max_tokens: most tokens of a row.
    """

    def __init__(
        self,
        library: LibraryAttention,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        max_tokens: int,
    ) -> None:
        self.library = library
        self.buffer = torch.empty((2, max_tokens, num_kv_heads, head_size), dtype=dtype)

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        sinks = None if cache.sinks is None else cache.sinks.detach().float()
        rows = zip(group.query_start, group.query_len, group.lengths, group.slots, strict=True)
        for start, count, length, slots in rows:
            queries = slice(start, start + count)
            asking, cos_sin = query[queries], None  # [n, Hq, D]
            if cache.rotation is not None:
                cos_sin = cache.rotation.cos_sin
                asking = rotate(asking, cos_sin[length - count : length])
            keys, values = self.buffer[:, :length]  # [m, Hkv, D]
            gather_tokens(cache.pages, torch.from_numpy(slots[:length]), keys, values, cos_sin)
            self.library(asking, keys, values, scale, sinks, cache.soft_cap, out[queries])
