"""The sparse block table names the sink, the best candidates and the rest, in order of position."""

import pytest
import torch

from tests.kernels.cases import int32
from vllm_tokenselect.kernels.block_table import cpu, reference
from vllm_tokenselect.method.settings import FULL_ATTENTION

UNTOUCHED = -7


def _build(operation, votes, block_table, row_seq, n_init, top_k, ends, context, block_size):
    slots = torch.full((len(ends), int(context.max()) + 5), UNTOUCHED, dtype=torch.int32)
    lengths = torch.full((len(ends),), UNTOUCHED, dtype=torch.int32)
    top_k = torch.as_tensor(top_k, dtype=torch.int32).expand(len(ends)).contiguous()
    operation.build_sparse_block_table(
        votes, block_table, row_seq, n_init, top_k, ends, context, block_size, slots, lengths
    )
    return slots, lengths


def _assert_same_table(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    slots, lengths = _build(cpu, *arguments)
    expected_slots, expected_lengths = _build(reference, *arguments)
    assert torch.equal(lengths, expected_lengths)
    assert torch.equal(slots, expected_slots)
    return slots, lengths


def _identity_table(rows: int, block_size: int) -> torch.Tensor:
    """One block table for all rows, in which a slot is its position."""
    return torch.arange(4096 // block_size, dtype=torch.int32).repeat(rows, 1)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("top_k", [1, 60, 1000])
def test_tables_are_those_of_the_definition(block_size: int, top_k: int):
    width = -(-2200 // block_size)
    block_table = torch.randperm(4 * width)[: 3 * width].view(3, width).to(torch.int32)
    block_table[1, :2] = block_table[0, :2]  # a shared prefix
    ends = int32(501, 2077, 19, 1300, 2000)
    context = ends + int32(70, 1, 100, 33, 128)
    votes = torch.rand(5, 2100) ** 8
    votes[4] = (votes[4] * 50).round() / 50  # many ties
    _assert_same_table(
        votes, block_table, int32(2, 0, 1, 2, 2), 19, top_k, ends, context, block_size
    )


def test_a_row_with_exactly_top_k_candidates_is_dense_and_one_more_leaves_the_worst_out():
    votes = torch.rand(2, 101) + 0.5
    votes[1, 40] = 0.1
    ends, context = int32(128 + 100, 128 + 101), int32(300, 300)
    slots, lengths = _assert_same_table(
        votes, _identity_table(2, 32), int32(0, 1), 128, 100, ends, context, 32
    )
    assert lengths.tolist() == [300, 299]
    assert 128 + 40 not in slots[1, :299].tolist()


def test_each_row_keeps_as_many_as_its_own_top_k_says():
    votes = torch.rand(3, 200) + 0.1
    ends, context = int32(216, 216, 216), int32(230, 230, 230)
    _, lengths = _assert_same_table(
        votes,
        _identity_table(3, 16),
        int32(0, 1, 2),
        16,
        int32(7, 199, FULL_ATTENTION),
        ends,
        context,
        16,
    )
    assert lengths.tolist() == [16 + 7 + 14, 16 + 199 + 14, 230]


@pytest.mark.parametrize("vote", [0.0, 1e-42, 0.37, float("inf")])
def test_ties_go_to_the_lowest_positions(vote: float):
    votes = torch.full((1, 500), vote)
    slots, lengths = _assert_same_table(
        votes, _identity_table(1, 16), int32(0), 16, 50, int32(516), int32(530), 16
    )
    assert slots[0, : lengths[0]].tolist() == [*range(16 + 50), *range(516, 530)]


def test_votes_that_differ_by_rounding_tie():
    votes = 0.37 + 1e-6 * torch.rand(1, 500)
    slots, _ = _assert_same_table(
        votes, _identity_table(1, 16), int32(0), 16, 50, int32(516), int32(530), 16
    )
    assert slots[0, : 16 + 50].tolist() == [*range(16 + 50)]


def test_a_nan_vote_is_the_lowest():
    votes = torch.rand(1, 500) + 0.1
    votes[0, 3] = float("nan")
    slots, lengths = _assert_same_table(
        votes, _identity_table(1, 16), int32(0), 16, 499, int32(516), int32(530), 16
    )
    assert 16 + 3 not in slots[0, : lengths[0]].tolist()


def test_dense_rows_need_no_votes():
    slots, lengths = _assert_same_table(
        None, _identity_table(2, 16), int32(0, 1), 16, 50, int32(66, 3), int32(80, 10), 16
    )
    assert lengths.tolist() == [80, 10]
    assert (slots[0, 80:] == UNTOUCHED).all()


def test_more_candidates_than_top_k_without_votes_is_refused():
    with pytest.raises(ValueError, match="51 candidates for top_k=50"):
        _build(cpu, None, _identity_table(1, 16), int32(0), 16, 50, int32(67), int32(80), 16)
