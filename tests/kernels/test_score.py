"""Scores read in place are those of the definition."""

import pytest
import torch

from tests.kernels.cases import SHAPES, Case, int32, paged_cache
from vllm_tokenselect.kernels.score import cpu, reference


def _assert_same_scores(*arguments) -> torch.Tensor:
    expected = reference.score_paged_keys(*arguments)
    actual = cpu.score_paged_keys(*arguments)
    assert actual.shape == expected.shape
    assert torch.equal(actual.isneginf(), expected.isneginf())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    return actual


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores_are_those_of_the_definition(case: Case):
    kv_cache, block_table = paged_cache(case)
    query = torch.randn(case.rows, case.num_heads, case.head_size)
    start = 19
    ends = torch.randint(start, case.tokens + 1, (case.rows,), dtype=torch.int32)
    ends[0] = case.tokens  # mid-block in most shapes
    row_seq = torch.arange(case.rows, dtype=torch.int32)
    _assert_same_scores(query, kv_cache, block_table, row_seq, start, ends, 0.3)


@pytest.mark.parametrize("rows", [2, 7, 40])
def test_consecutive_rows_of_one_request_each_end_at_their_own_candidate(rows: int):
    case = Case(2, 1100, 9, 3, 64, 32, "bf16")
    kv_cache, block_table = paged_cache(case)
    query = torch.randn(rows + 2, case.num_heads, case.head_size)
    row_seq = int32(1, *[0] * rows, 1)
    ends = int32(400, *range(1000, 1000 + rows), 5)
    _assert_same_scores(query, kv_cache, block_table, row_seq, 128, ends, 0.125)


def test_a_rows_scores_are_the_same_bits_alone_and_in_company():
    case = Case(1, 777, 9, 3, 64, 32, "bf16")
    kv_cache, block_table = paged_cache(case)
    query = torch.randn(9, case.num_heads, case.head_size)
    ends = int32(*range(700, 709))
    zeros = torch.zeros(9, dtype=torch.int32)
    together = cpu.score_paged_keys(query, kv_cache, block_table, zeros, 128, ends, 0.125)
    for row in range(9):
        rows = slice(row, row + 1)
        alone = cpu.score_paged_keys(
            query[rows], kv_cache, block_table, zeros[rows], 128, ends[rows], 0.125
        )
        assert torch.equal(alone[0], together[row, :, : alone.shape[2]])


def test_a_row_without_candidates_scores_minus_infinity():
    case = Case(3, 200, 9, 3, 64, 32, "bf16")
    kv_cache, block_table = paged_cache(case)
    query = torch.randn(3, case.num_heads, case.head_size)
    logits = _assert_same_scores(
        query, kv_cache, block_table, int32(0, 1, 2), 64, int32(64, 150, -3), 0.125
    )
    assert logits[[0, 2]].isneginf().all()


def test_no_candidates_at_all_gives_an_empty_result():
    case = Case(2, 64, 9, 3, 64, 32, "bf16")
    kv_cache, block_table = paged_cache(case)
    query = torch.randn(2, case.num_heads, case.head_size)
    logits = _assert_same_scores(
        query, kv_cache, block_table, int32(0, 1), 128, int32(10, 128), 0.125
    )
    assert logits.shape == (2, 9, 0)


def test_every_fp16_number_is_read_exactly():
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    halves = bits.view(torch.float16)  # subnormals, infinities and NaN among them
    kv_cache = torch.zeros(1, 1, 2, len(halves), 1, dtype=torch.float16)
    kv_cache[0, 0, 0, :, 0] = halves
    logits = cpu.score_paged_keys(
        torch.ones(1, 1, 1), kv_cache, int32(0).view(1, 1), int32(0), 0, int32(len(halves)), 1.0
    )
    torch.testing.assert_close(logits[0, 0], halves.float(), rtol=0, atol=0, equal_nan=True)
