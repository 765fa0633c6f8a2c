"""Readable definition of the gather."""

from __future__ import annotations

import torch


def gather_tokens(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """Copy the cached tokens that `slots` names, in its order.

    Args:
        kv_cache: fp32, bf16 or fp16 [num_blocks, Hkv, 2, block_size, D], contiguous.
        slots: int32 [n], `block_id * block_size + offset`.
        out_keys, out_values: [n, Hkv, D] of the cache's dtype, written.
    """
    block_size = kv_cache.shape[3]
    index = slots.long()
    tokens = kv_cache[index // block_size, :, :, index % block_size]  # [n, Hkv, 2, D]
    out_keys.copy_(tokens[:, :, 0])
    out_values.copy_(tokens[:, :, 1])
