"""Gather on a CPU: one copy of each token's keys and values, without an index tensor in between."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_arrays import cache_elements, int32_array
from vllm_tokenselect.kernels.cpu_tiles import copy_run


def gather_tokens(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """As `reference.gather_tokens`; the buffers are contiguous."""
    _gather(
        cache_elements(kv_cache),
        int32_array(slots),
        kv_cache.shape[1],
        kv_cache.shape[3],
        kv_cache.shape[4],
        cache_elements(out_keys),
        cache_elements(out_values),
    )


@njit(parallel=True, cache=True)
def _gather(elements, slots, num_kv_heads, block_size, head_size, out_keys, out_values):
    head_stride = 2 * block_size * head_size
    for index in prange(len(slots)):
        slot = slots[index]
        token = slot // block_size * num_kv_heads * head_stride + slot % block_size * head_size
        for head in range(num_kv_heads):
            key = token + head * head_stride
            value = key + block_size * head_size
            target = (index * num_kv_heads + head) * head_size
            copy_run(elements, key, out_keys, target, head_size)
            copy_run(elements, value, out_values, target, head_size)
