"""vLLM's own C++ attention for CPUs, over gathered tokens.

It wants keys packed as its instruction set likes them, in pages. So each row's gathered tokens are
written by vLLM's own writer into scratch pages and attended there; no key of the context is copied but
the few thousand that were selected.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

# Any multiple of 32, which every instruction set of vLLM's kernels accepts.
PAGE_SIZE = 128


class CallPlan(NamedTuple):
    """What the operation wants to know of a call."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scheduler_metadata: torch.Tensor


@lru_cache(maxsize=1024)
def plan_call(
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
) -> CallPlan:
    """Plan the attention of `num_queries` over `num_keys`, causal, aligned to the lower right.

    The layers of a step share the plans of its rows, and so do rows of the same lengths.
    """
    query_start_loc = torch.tensor([0, num_queries], dtype=torch.int32)
    seq_lens = torch.tensor([num_keys], dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=seq_lens,
        dtype=dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=_get_attn_isa(dtype, PAGE_SIZE, head_size),
        enable_kv_split=True,
    )
    return CallPlan(query_start_loc, seq_lens, metadata)


class CpuAttention:
    """Attention over gathered keys and values; one for all layers of a shape, since it is scratch.

    Args:
        num_kv_heads, head_size, dtype: of the KV cache.
        max_tokens: most keys of one row.
    """

    def __init__(
        self, num_kv_heads: int, head_size: int, dtype: torch.dtype, max_tokens: int
    ) -> None:
        self.num_pages = -(-max_tokens // PAGE_SIZE)
        self.shape = (self.num_pages, num_kv_heads, 2 * PAGE_SIZE, head_size)
        self.dtype = dtype
        self.isa = _get_attn_isa(dtype, PAGE_SIZE, head_size)
        self.block_table = torch.arange(self.num_pages, dtype=torch.int32)[None]
        self.slot_mapping = torch.arange(self.num_pages * PAGE_SIZE, dtype=torch.int64)
        self.zeros = torch.zeros((PAGE_SIZE, num_kv_heads, head_size), dtype=dtype)

    @cached_property
    def pages(self) -> torch.Tensor:
        # numpy's zeros take no memory before they are written, and few rows are as long as allowed.
        size = math.prod(self.shape) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(size, np.uint8)).view(self.dtype).view(self.shape)

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
        """Attend `query` [n, Hq, D] to `keys`, `values` [m, Hkv, D]; see `LibraryAttention`."""
        plan = plan_call(len(query), len(keys), query.shape[1], *keys.shape[1:], query.dtype)
        key_pages, value_pages = self.pages.chunk(2, dim=2)
        self._write(keys, values, 0)
        # The operation multiplies what it masks by zero, in whole tiles; what another request left
        # there may be infinite or NaN.
        rest = self.zeros[: -len(keys) % PAGE_SIZE]
        self._write(rest, rest, len(keys))
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_pages,
            value_cache=value_pages,
            output=out,
            query_start_loc=plan.query_start_loc,
            seq_lens=plan.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=soft_cap,
            scheduler_metadata=plan.scheduler_metadata,
            s_aux=sinks,
        )

    def _write(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        if len(keys):
            slots = self.slot_mapping[first : first + len(keys)]
            key_pages, value_pages = self.pages.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(keys, values, key_pages, value_pages, slots, self.isa)
