"""Gathered tokens are the cached ones, in the table's order, rotated to it when asked."""

import pytest
import torch

from tests.kernels.cases import Case
from tests.kernels_gpu.cases import DEVICE, SHAPES, device_cache, int32
from vllm_tokenselect.kernels.gather import gpu, reference

LENGTHS = (45, 0, 70)


def gathered(operation, case: Case, layout: str, cos_sin: torch.Tensor | None):
    torch.manual_seed(0)
    kv_cache, _ = device_cache(case, layout)
    num_slots = kv_cache.shape[0] * case.block_size
    slots = torch.randint(num_slots, (3, 75), device=DEVICE).to(torch.int32)
    quantized = case.dtype == "fp8"
    dtype = torch.float16 if quantized else kv_cache.dtype
    scales = [torch.tensor([s], device=DEVICE) if quantized else None for s in (0.5, 1.5)]
    shape = (3, 80, case.num_kv_heads, case.head_size)
    out = [torch.full(shape, 9.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    operation.gather_rows(kv_cache, slots, int32(*LENGTHS), *out, cos_sin, *scales, zeroed=16)
    return out


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tokens_are_copied_bit_by_bit(case: Case, layout: str):
    for actual, expected in zip(
        gathered(gpu, case, layout, None), gathered(reference, case, layout, None), strict=True
    ):
        assert torch.equal(actual, expected)
        for line, length, end in zip(actual, LENGTHS, (48, 16, 80), strict=True):
            assert (line[length:end] == 0).all()
            assert (line[end:] == 9).all(), "written past the row's end"


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("share", [1, 2], ids=["whole", "half"])
def test_keys_are_rotated_to_their_place_in_the_table_and_values_are_not(case: Case, share: int):
    rotated = case.head_size // share
    angle = torch.outer(torch.arange(80.0), 0.3 ** torch.arange(rotated // 2))
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1).to(DEVICE)
    keys, values = gathered(gpu, case, "tokens", cos_sin)
    expected_keys, expected_values = gathered(reference, case, "tokens", cos_sin)
    torch.testing.assert_close(keys, expected_keys, rtol=2e-2, atol=1e-2)
    assert torch.equal(values, expected_values)
