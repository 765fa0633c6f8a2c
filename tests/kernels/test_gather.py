"""Gathered tokens are the cached ones, bit for bit."""

import pytest
import torch

from tests.kernels.cases import SHAPES, Case, paged_cache
from vllm_tokenselect.kernels.gather import cpu, reference


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gathered_tokens_are_the_cached_ones(case: Case):
    kv_cache, _ = paged_cache(case)
    num_slots = kv_cache.shape[0] * case.block_size
    slots = torch.randint(0, num_slots, (case.tokens,), dtype=torch.int32)
    shape = (2, case.tokens + 1, case.num_kv_heads, case.head_size)
    actual, expected = (torch.zeros(shape, dtype=case.torch_dtype) for _ in range(2))
    for operation, (keys, values) in ((cpu, actual), (reference, expected)):
        operation.gather_tokens(kv_cache, slots, keys[:-1], values[:-1])
    assert torch.equal(actual, expected)


def test_no_tokens_write_nothing():
    kv_cache, _ = paged_cache(SHAPES[0])
    keys = torch.empty(0, 3, 64, dtype=torch.bfloat16)
    cpu.gather_tokens(kv_cache, torch.empty(0, dtype=torch.int32), keys, keys.clone())
