"""Write new keys and values into their pages on a CPU."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_arrays import (
    cache_elements,
    elements_at,
    locate_tokens,
    with_whole_tokens,
)
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import copy_run

# From so many tokens on, threads save more than it costs to wake them.
PARALLEL_TOKENS = 16


def write_tokens(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """As `reference.write_tokens`; `kv_cache` and `slot_mapping` are contiguous."""
    write_elements(key, value, kv_cache, cache_elements(kv_cache), slot_mapping)


def write_elements(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    elements: np.ndarray,
    slot_mapping: torch.Tensor,
) -> None:
    """As `write_tokens`, with the elements of `kv_cache`, which a caller keeps from step to step."""
    key, value = with_whole_tokens(key), with_whole_tokens(value)
    _, num_kv_heads, _, block_size, head_size = kv_cache.shape
    _write(
        locate_tokens(key, kv_cache.dtype),
        locate_tokens(value, kv_cache.dtype),
        elements,
        slot_mapping.numpy(),
        num_kv_heads,
        block_size,
        head_size,
    )


@compile_once(parallel=True)
def _write(keys, values, elements, slots, num_kv_heads, block_size, head_size):
    """Keys and values [Hkv, D] of token `t` into the page and line that `slots[t]` names."""
    page = num_kv_heads, block_size, head_size
    if len(slots) < PARALLEL_TOKENS:
        for token in range(len(slots)):
            _write_token(keys, values, token, elements, slots[token], page)
    else:
        for token in prange(len(slots)):
            _write_token(keys, values, token, elements, slots[token], page)


@njit
def _write_token(keys, values, token, elements, slot, page):
    num_kv_heads, block_size, head_size = page
    key_address, key_size, key_distance = keys
    value_address, value_size, value_distance = values
    own_keys = elements_at(key_address, key_size, elements)
    own_values = elements_at(value_address, value_size, elements)
    line = slot // block_size * num_kv_heads * 2 * block_size * head_size
    line += slot % block_size * head_size
    for head in range(num_kv_heads):
        source = head * head_size
        target = line + head * 2 * block_size * head_size
        copy_run(own_keys, token * key_distance + source, elements, target, head_size)
        target += block_size * head_size
        copy_run(own_values, token * value_distance + source, elements, target, head_size)
