"""Gather, readable: copy the named tokens into contiguous buffers."""

from __future__ import annotations

import torch


def gather_tokens(
    kv_cache: torch.Tensor, slots: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor
) -> None:
    """Copy keys and values of `slots` int32 [n] to `out_keys`, `out_values` [n, Hkv, D].

    Args:
        kv_cache: [num_blocks, Hkv, 2, block_size, D]; slot = block * block_size + offset.
    """
    block_size = kv_cache.shape[3]
    block, offset = slots.long() // block_size, slots.long() % block_size
    out_keys.copy_(kv_cache[block, :, 0, offset])
    out_values.copy_(kv_cache[block, :, 1, offset])
