"""Write new keys and values into their pages. Plain PyTorch, and fast enough to be served."""

from __future__ import annotations

import torch


def write_tokens(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write `key`, `value` [T, Hkv, D] to the slots int64 [T].

    Args:
        kv_cache: [num_blocks, Hkv, 2, block_size, D]; slot = block * block_size + offset.
    """
    block_size = kv_cache.shape[3]
    tokens = kv_cache.permute(0, 3, 2, 1, 4)  # [num_blocks, block_size, 2, Hkv, D]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    tokens[block, offset] = torch.stack([key, value], dim=1)
