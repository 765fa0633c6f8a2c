"""Attention over gathered tokens reads nothing of what an earlier row left in its pages."""

import pytest
import torch

pytest.importorskip("vllm")

from tests.oracle.step import sdpa
from vllm_tokenselect.backend.cpu_attention import CpuAttention

HEADS, KV_HEADS, MOST = 4, 2, 768


@pytest.fixture(autouse=True, scope="module")
def tiles() -> None:
    """Have Linux asked for the processor's tiles (AMX), as a model's first product does.

    vLLM's attention uses them without asking.
    """
    ones = torch.ones(128, 128, dtype=torch.bfloat16)
    ones @ ones


def attend(
    library: CpuAttention,
    dtype: torch.dtype,
    head_size: int,
    num_keys: int,
    sinks=None,
    soft_cap=0.0,
):
    generator = torch.Generator().manual_seed(num_keys)
    num_queries = min(num_keys, 33)

    def random(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, head_size, generator=generator).to(dtype)

    query, out = random(num_queries, HEADS), torch.empty(num_queries, HEADS, head_size, dtype=dtype)
    keys, values = random(num_keys, KV_HEADS), random(num_keys, KV_HEADS)
    library(query, keys, values, 0.2, sinks, soft_cap, out)
    return out, (query, keys, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [32, 80, 128])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_the_pages_held_before_changes_no_bit(dtype, head_size, number):
    library = CpuAttention(KV_HEADS, head_size, dtype, MOST)
    for num_keys in (2, 40, 127, 128, 129, 300, 420, 513, 700, MOST):
        library.pages.zero_()
        clean, _ = attend(library, dtype, head_size, num_keys)
        library.pages.fill_(number)
        assert torch.equal(attend(library, dtype, head_size, num_keys)[0], clean), num_keys
        assert not clean.isnan().any()


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_size", [32, 80])
@pytest.mark.parametrize("soft_cap", [0.0, 1.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_vllms_operation_takes_sinks_and_caps_as_they_are_defined(
    dtype, head_size, soft_cap, has_sinks
):
    library = CpuAttention(KV_HEADS, head_size, dtype, MOST)
    sinks = torch.tensor([-2.0, 1.0, 4.0, 7.0]) if has_sinks else None
    for num_keys in (2, 40, 129, 700):
        out, asked = attend(library, dtype, head_size, num_keys, sinks, soft_cap)
        defined = torch.empty_like(out)
        sdpa(*asked, 0.2, sinks, soft_cap, defined)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out, defined, rtol=tolerance, atol=tolerance)
