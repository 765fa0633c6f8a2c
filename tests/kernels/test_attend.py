"""Attention read in place is that of the definition."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cases import (
    DTYPES,
    SHAPES,
    SOFTMAX,
    Case,
    int32,
    make_group,
    make_rotation,
    make_softmax,
    paged_cache,
    run_group,
)
from vllm_tokenselect.kernels.attend import reference
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.method.settings import Method

TOLERANCE = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 8e-3}  # of the output's own rounding


def _random_slots(case: Case, kv_cache: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    return torch.randint(0, kv_cache.shape[0] * case.block_size, (rows, width), dtype=torch.int32)


def attend_on_the_cpu(
    query, index, kv_cache, slots, lengths, scale, out, rotation: Rotation | None = None, **softmax
) -> None:
    none = torch.zeros(len(index), dtype=torch.int32)
    group = make_group(index, none, none, none, slots, lengths, selects=False)
    cache = LayerCache(kv_cache, rotation=rotation, **softmax)
    run_group(group, query, cache, none.view(-1, 1), Method(), out, scale)


BOTH = [attend_on_the_cpu, reference.attend_single_queries]


def every(query: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(query), dtype=torch.int32)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention_is_that_of_the_definition(case: Case):
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, case.rows, case.tokens)
    lengths = torch.randint(1, case.tokens + 1, (case.rows,), dtype=torch.int32)
    lengths[0] = case.tokens
    query = torch.randn(case.rows, case.num_heads, case.head_size).to(case.torch_dtype)
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        operation(query, every(query), kv_cache, slots, lengths, 0.3, out)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_tokens_are_rotated_in_their_order_and_the_query_as_the_last(case: Case, share: float):
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, case.rows, case.tokens)
    lengths = torch.randint(1, case.tokens + 1, (case.rows,), dtype=torch.int32)
    query = torch.randn(case.rows, case.num_heads, case.head_size).to(case.torch_dtype)
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    rotation = make_rotation(case, share)
    arguments = (query, every(query), kv_cache, slots, lengths, 0.3)
    attend_on_the_cpu(*arguments, actual, rotation)
    reference.attend_single_queries(*arguments, expected, rotation.cos_sin)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sinks_and_caps_are_those_of_the_definition(case: Case, name: str):
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, case.rows, case.tokens)
    lengths = torch.randint(1, case.tokens + 1, (case.rows,), dtype=torch.int32)
    lengths[0] = case.tokens
    query = torch.randn(case.rows, case.num_heads, case.head_size).to(case.torch_dtype)
    softmax = make_softmax(case, name)
    actual, expected, without = (torch.empty_like(query) for _ in range(3))
    arguments = (query, every(query), kv_cache, slots, lengths, 0.3)
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        operation(*arguments, out, **softmax)
    reference.attend_single_queries(*arguments, without)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert (expected - without).abs().max() > 0.05, "sinks and caps should matter"


@pytest.mark.parametrize("name", SOFTMAX)
def test_sinks_and_caps_go_with_rotated_tokens(name: str):
    case = SHAPES[1]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 3, case.tokens)
    lengths, rotation = int32(1, 40, case.tokens), make_rotation(case)
    query = torch.randn(3, case.num_heads, case.head_size)
    softmax = make_softmax(case, name)
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    arguments = (query, every(query), kv_cache, slots, lengths, 0.3)
    attend_on_the_cpu(*arguments, actual, rotation, **softmax)
    reference.attend_single_queries(*arguments, expected, rotation.cos_sin, **softmax)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("soft_cap", [1e-3, 0.5, 30.0, 1e4])
def test_a_cap_is_exact_for_scores_far_below_and_far_above_it(soft_cap: float):
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 4, 600)
    lengths = int32(600, 600, 600, 600)
    query = torch.randn(4, 9, 64) * torch.tensor([1e-4, 0.1, 1.0, 30.0])[:, None, None]
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        arguments = (query, every(query), kv_cache, slots, lengths, 0.125)
        operation(*arguments, out, soft_cap=soft_cap)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 511, 513, 1300])
def test_a_sink_takes_its_share_once_whatever_the_splits(length: int):
    """Equal tokens and a sink of the same score: the sink is one token more, of value zero."""
    kv_cache = torch.zeros(1, 3, 2, 16, 64)
    kv_cache[:, :, 1] = 1.0
    query, out = torch.randn(1, 9, 64), torch.empty(1, 9, 64)
    slots = torch.zeros(1, length, dtype=torch.int32)
    arguments = (query, every(query), kv_cache, slots, int32(length), 0.125, out)
    for operation in BOTH:
        operation(*arguments, sinks=torch.zeros(9))
        expected = torch.full_like(out, length / (length + 1))
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_a_sink_far_above_or_below_all_scores_takes_all_or_nothing():
    case = SHAPES[1]
    kv_cache, _ = paged_cache(case)
    query = torch.randn(3, 9, 64)
    slots = _random_slots(case, kv_cache, 3, 513)
    arguments = (query, every(query), kv_cache, slots, int32(513, 20, 1), 0.125)
    without = torch.empty_like(query)
    attend_on_the_cpu(*arguments, without)
    for operation in BOTH:
        out = torch.empty_like(query)
        operation(*arguments, out, sinks=torch.full((9,), 200.0))
        assert out.abs().max() < 1e-30
        operation(*arguments, out, sinks=torch.full((9,), -200.0))
        torch.testing.assert_close(out, without, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_have_any_dtype_and_may_be_parameters(dtype: str):
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 1, 100)
    query = torch.randn(1, 9, 64)
    sinks = torch.nn.Parameter(torch.randn(9).to(DTYPES[dtype]))
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    arguments = (query, every(query), kv_cache, slots, int32(100), 0.125)
    attend_on_the_cpu(*arguments, actual, sinks=sinks)
    attend_on_the_cpu(*arguments, expected, sinks=sinks.detach().float())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_need_not_have_the_caches_dtype(dtype: str):
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 1, 100)
    query = torch.randn(1, 9, 64).to(DTYPES[dtype])
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        operation(query, every(query), kv_cache, slots, int32(100), 0.125, out)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_lie_anywhere_in_a_slice_of_the_projection_and_the_others_are_left_alone(
    dtype: str,
):
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots, lengths, index = _random_slots(case, kv_cache, 2, 100), int32(100, 40), int32(5, 2)
    query = torch.randn(7, 15 * 64).to(DTYPES[dtype])[:, 64 : 10 * 64].view(7, 9, 64)
    actual, expected = torch.full((2, 7, 9, 64), 9.0, dtype=DTYPES[dtype])
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        operation(query, index, kv_cache, slots, lengths, 0.125, out)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (actual[[0, 1, 3, 4, 6]] == 9).all()


def test_a_row_without_tokens_gives_zeros():
    case = SHAPES[1]
    kv_cache, _ = paged_cache(case)
    query = torch.randn(3, 9, 64)
    for operation in BOTH:
        slots = _random_slots(case, kv_cache, 3, 20)
        arguments = (query, every(query), kv_cache, slots, int32(0, 20, 0), 0.125)
        for softmax in ({}, {"sinks": torch.ones(9)}, {"soft_cap": 5.0}):
            out = torch.full_like(query, float("nan"))
            operation(*arguments, out, **softmax)
            assert not out[[0, 2]].any()
            assert out[1].isfinite().all()


@pytest.mark.parametrize("length", [1, 4, 511, 512, 513, 1024, 1025])
def test_splits_are_joined_at_every_boundary(length: int):
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 1, length)
    query = torch.randn(1, 9, 64)
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        operation(query, every(query), kv_cache, slots, int32(length), 0.125, out)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_large_scores_neither_overflow_nor_vanish():
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 1, 600)
    query = torch.randn(1, 9, 64) * 300
    actual, expected = torch.empty_like(query), torch.empty_like(query)
    for operation, out in zip(BOTH, (actual, expected), strict=True):
        operation(query, every(query), kv_cache, slots, int32(600), 1.0, out)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [None, *SOFTMAX])
def test_a_rows_output_is_the_same_bits_alone_and_in_company(name):
    case = SHAPES[0]
    kv_cache, _ = paged_cache(case)
    slots = _random_slots(case, kv_cache, 5, 1500)
    lengths = int32(1500, 7, 900, 1400, 513)
    query = torch.randn(5, 9, 64)
    softmax = make_softmax(case, name) if name else {}
    together, alone = torch.empty_like(query), torch.empty_like(query)
    attend_on_the_cpu(query, every(query), kv_cache, slots, lengths, 0.125, together, **softmax)
    for row in range(5):
        rows = slice(row, row + 1)
        attend_on_the_cpu(
            query[rows],
            int32(0),
            kv_cache,
            slots[rows],
            lengths[rows],
            0.125,
            alone[rows],
            **softmax,
        )
    assert torch.equal(alone, together)


def test_the_definition_agrees_with_pytorch_on_rows_of_several_queries():
    case = Case(2, 90, 9, 3, 64, 16, "fp32")
    kv_cache, _ = paged_cache(case)
    slots, lengths = _random_slots(case, kv_cache, 2, 90), int32(90, 41)
    query = torch.randn(25, 9, 64)
    out = torch.empty_like(query)
    reference.attend(query, int32(0, 17, 25), kv_cache, slots, lengths, 0.125, out)
    for row, queries in enumerate((slice(0, 17), slice(17, 25))):
        index = slots[row, : lengths[row]].long()
        tokens = kv_cache[index // 16, :, :, index % 16]  # [m, Hkv, 2, D]
        keys, values = (part.transpose(0, 1)[None] for part in tokens.unbind(dim=2))
        rows = query[queries].transpose(0, 1)[None]
        mask = torch.ones(rows.shape[2], len(index), dtype=torch.bool)
        expected = F.scaled_dot_product_attention(
            rows,
            keys,
            values,
            attn_mask=mask.tril(len(index) - rows.shape[2]),
            scale=0.125,
            enable_gqa=True,
        )
        torch.testing.assert_close(out[queries], expected[0].transpose(0, 1))
