"""Write new keys and values into their pages on a CPU."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
from numba import prange

from vllm_tokenselect.kernels.cpu_arrays import cache_elements, token_elements
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import copy_run


def write_tokens(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """As `reference.write_tokens`; `kv_cache` and `slot_mapping` are contiguous."""
    _write(
        *token_elements(key),
        *token_elements(value),
        cache_elements(kv_cache),
        slot_mapping.numpy(),
        kv_cache.shape[1],
        kv_cache.shape[3],
        kv_cache.shape[4],
    )


@compile_once(parallel=True)
def _write(
    keys, key_distance, values, value_distance, elements, slots, num_kv_heads, block_size, head_size
):
    """Keys and values [Hkv, D] of token `t` into the page and line that `slots[t]` names."""
    head_stride = 2 * block_size * head_size
    for token in prange(len(slots)):
        slot = slots[token]
        page = slot // block_size * num_kv_heads * head_stride + slot % block_size * head_size
        for head in range(num_kv_heads):
            target = page + head * head_stride
            source = head * head_size
            copy_run(keys, token * key_distance + source, elements, target, head_size)
            target += block_size * head_size
            copy_run(values, token * value_distance + source, elements, target, head_size)
