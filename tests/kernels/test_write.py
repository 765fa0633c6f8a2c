"""Tokens are written to their own slots and nowhere else."""

import pytest
import torch

from vllm_tokenselect.kernels.gather.reference import gather_tokens
from vllm_tokenselect.kernels.write import cpu, reference


@pytest.mark.parametrize("operation", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_written_tokens_are_read_back_and_the_rest_is_untouched(operation, dtype, block_size):
    kv_cache = torch.zeros(5, 3, 2, block_size, 64, dtype=dtype)
    slots = torch.randperm(5 * block_size)[:37]
    # Slices of a projection, as a model hands them over.
    key, value = torch.randn(37, 2, 3, 64).to(dtype).unbind(dim=1)
    operation.write_tokens(key, value, kv_cache, slots)
    keys, values = torch.empty_like(key), torch.empty_like(value)
    gather_tokens(kv_cache, slots.int(), keys, values)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    assert kv_cache.count_nonzero() == key.count_nonzero() + value.count_nonzero()
