"""Gather on a CPU: one copy of each token's keys and values, without an index tensor in between."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from vllm_tokenselect.kernels.cpu_arrays import cache_elements, int32_array, rotation_table
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import copy_run, narrow, rotate_run
from vllm_tokenselect.kernels.cpu_tiles import widen


def gather_tokens(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
) -> None:
    """As `reference.gather_tokens`; the buffers are contiguous."""
    _gather(
        cache_elements(kv_cache),
        int32_array(slots),
        kv_cache.shape[1],
        kv_cache.shape[3],
        kv_cache.shape[4],
        rotation_table(cos_sin),
        cache_elements(out_keys),
        cache_elements(out_values),
    )


@compile_once(parallel=True)
def _gather(elements, slots, num_kv_heads, block_size, head_size, cos_sin, out_keys, out_values):
    """`out_keys[i] = rotate(key(slots[i]), i)`, `out_values[i] = value(slots[i])`, each [Hkv, D]."""
    head_stride = 2 * block_size * head_size
    for index in prange(len(slots)):
        slot = slots[index]
        token = slot // block_size * num_kv_heads * head_stride + slot % block_size * head_size
        turned = np.empty(head_size, np.float32)
        for head in range(num_kv_heads):
            key = token + head * head_stride
            value = key + block_size * head_size
            target = (index * num_kv_heads + head) * head_size
            if cos_sin.shape[1] > 0:
                widen(elements, key, head_size, turned, 0)  # [D]
                rotate_run(turned, 0, cos_sin, index)
                narrow(turned, out_keys, target)
            else:
                copy_run(elements, key, out_keys, target, head_size)
            copy_run(elements, value, out_values, target, head_size)
