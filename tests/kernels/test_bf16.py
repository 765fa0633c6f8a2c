"""Products of bf16 numbers where they lie are those of the definition, on any processor."""

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.registry import cpu_target

from tests.kernels.cases import Case, int32, make_group, paged_cache, run_group
from vllm_tokenselect.kernels import cpu_bf16
from vllm_tokenselect.kernels.attend import reference as attention
from vllm_tokenselect.kernels.cpu_tiles import TILE_TOKENS
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.score import cpu, reference
from vllm_tokenselect.method.settings import Method

# Head sizes that fill vectors, fill none, are odd; 1 to 8 query heads of a KV head.
SHAPES = [
    Case(1, 640, 9, 3, 64, 32, "bf16"),
    Case(3, 513, 8, 1, 128, 16, "bf16"),
    Case(2, 300, 2, 2, 80, 16, "bf16"),
    Case(2, 45, 14, 2, 37, 16, "bf16"),
    Case(2, 130, 6, 3, 8, 128, "bf16"),
]
EVERY_LENGTH = [0, 1, 15, 16, 17, 45, 512, 513]


def lengths_of(case: Case) -> torch.Tensor:
    return int32(*(length for length in EVERY_LENGTH if length <= case.tokens))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores_of_bf16_queries_are_those_of_the_definition(case: Case):
    kv_cache, block_table = paged_cache(case)
    ends = lengths_of(case)
    query = torch.randn(len(ends), case.num_heads, case.head_size).bfloat16()
    row_seq = torch.zeros(len(ends), dtype=torch.int32)
    arguments = (kv_cache, block_table, row_seq, 1, ends, 0.3)
    expected = reference.score_paged_keys(query.float(), *arguments)
    actual = cpu.score_paged_keys(query, *arguments)
    assert torch.equal(actual.isneginf(), expected.isneginf())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for row in range(len(ends)):
        one = slice(row, row + 1)
        arguments = (kv_cache, block_table, row_seq[one], 1, ends[one], 0.3)
        alone = cpu.score_paged_keys(query[one], *arguments)
        assert torch.equal(alone[0], actual[row, :, : alone.shape[2]]), "in any company"


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_attention_of_bf16_queries_is_that_of_the_definition(case: Case):
    kv_cache, _ = paged_cache(case)
    lengths = lengths_of(case)
    num_slots = kv_cache.shape[0] * case.block_size
    slots = torch.randint(0, num_slots, (len(lengths), case.tokens), dtype=torch.int32)
    query = torch.randn(len(lengths), case.num_heads, case.head_size).bfloat16()
    index = torch.arange(len(lengths), dtype=torch.int32)
    none, actual = torch.zeros_like(index), torch.empty_like(query)
    group = make_group(index, none, none, none, slots, lengths, selects=False)
    run_group(group, query, LayerCache(kv_cache), none.view(-1, 1), Method(), actual, 0.3)
    expected = torch.empty_like(query)
    attention.attend_single_queries(query, index, kv_cache, slots, lengths, 0.3, expected)
    torch.testing.assert_close(actual, expected, rtol=8e-3, atol=8e-3)


def products(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Of one query [D] with `TILE_TOKENS` keys [T, D], compiled here and now."""

    @njit
    def multiply(query, keys, head_size, scale, out):
        places = np.empty(TILE_TOKENS, np.int64)
        starts, tile = (
            np.arange(TILE_TOKENS) * head_size,
            np.zeros(TILE_TOKENS * head_size, np.uint16),
        )
        cpu_bf16.place_tile(keys, starts, 0, TILE_TOKENS, 0, head_size, tile, places)
        cpu_bf16.dot_bf16_tile(query, 0, places, head_size // 32, scale, out, 0)

    out = np.empty(TILE_TOKENS, np.float32)
    multiply(query, keys.reshape(-1), len(query), np.float32(0.125), out)
    return out


def test_a_processor_without_bf16_products_computes_the_same(monkeypatch):
    numbers = torch.randn(1 + TILE_TOKENS, 96).bfloat16()
    bits = numbers.view(torch.uint16).numpy()
    exact = (numbers[1:].double() @ numbers[0].double()) * 0.125
    found = {}
    kinds = [False]
    if "+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2]:
        kinds.append(True)
    for kind in kinds:
        monkeypatch.setattr(cpu_bf16, "_has_bf16_products", lambda _, kind=kind: kind)
        found[kind] = torch.from_numpy(products(bits[0], bits[1:]))
        torch.testing.assert_close(found[kind].double(), exact, rtol=1e-6, atol=1e-5)
    if len(kinds) == 2:
        torch.testing.assert_close(found[True], found[False], rtol=1e-6, atol=1e-6)
