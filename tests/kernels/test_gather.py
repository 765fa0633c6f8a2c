"""Gathered tokens are the cached ones, bit for bit; rotated, they are what the definition says."""

import pytest
import torch

from tests.kernels.cases import SHAPES, Case, make_rotation, paged_cache
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


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_keys_are_rotated_to_their_index_and_values_are_not(case: Case, share: float):
    kv_cache, _ = paged_cache(case)
    slots = torch.randint(0, kv_cache.shape[0] * case.block_size, (case.tokens,)).int()
    shape = (2, case.tokens, case.num_kv_heads, case.head_size)
    actual, expected = (torch.zeros(shape, dtype=case.torch_dtype) for _ in range(2))
    cos_sin = make_rotation(case, share).cos_sin
    for operation, (keys, values) in ((cpu, actual), (reference, expected)):
        operation.gather_tokens(kv_cache, slots, keys, values, cos_sin)
    assert torch.equal(actual[1], expected[1])
    # A sum may be rounded the other way where its products are fused.
    spacing = torch.finfo(case.torch_dtype).eps
    torch.testing.assert_close(actual[0], expected[0], rtol=spacing, atol=spacing)
    rotated = cos_sin.shape[1]
    assert torch.equal(actual[0, ..., rotated:], expected[0, ..., rotated:])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_number_is_rounded_as_pytorch_does(dtype: str):
    """All finite numbers of the dtype, times a factor that leaves their last bits to rounding."""
    case = Case(1, 512, 1, 1, 128, 16, dtype)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(case.torch_dtype)
    every = every.where(every.isfinite(), 0).view(32, 1, 1, 16, 128).expand(-1, -1, 2, -1, -1)
    factor = 1 + 1 / 300
    cos_sin = torch.tensor([factor] * 64 + [0.0] * 64).expand(512, 128).contiguous()
    keys = torch.empty(512, 1, 128, dtype=case.torch_dtype)
    slots = torch.arange(512, dtype=torch.int32)
    cpu.gather_tokens(every.contiguous(), slots, keys, keys.clone(), cos_sin)
    stored = every[:, :, 0].reshape(512, 1, 128)
    expected = (stored.float() * cos_sin[0, 0]).to(case.torch_dtype)
    assert torch.equal(keys, expected)
    assert expected.isinf().any(), "the largest numbers should pass the dtype's range"
