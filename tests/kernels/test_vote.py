"""Every head has one vote."""

import pytest
import torch

from vllm_tokenselect.kernels.vote import cpu, reference


@pytest.mark.parametrize(
    ("rows", "heads", "width"), [(1, 9, 7000), (5, 28, 513), (3, 1, 1), (64, 9, 65)]
)
def test_votes_are_those_of_the_definition(rows: int, heads: int, width: int):
    logits = torch.randn(rows, heads, width) * 5
    for row in range(1, rows):
        logits[row, :, width - row % width :] = float("-inf")
    expected = reference.soft_vote(logits)
    torch.testing.assert_close(cpu.soft_vote(logits.clone()), expected)


@pytest.mark.parametrize("operation", [cpu, reference], ids=["cpu", "reference"])
def test_a_row_without_candidates_gets_zeros_and_the_others_one_vote_a_head(operation):
    logits = torch.randn(3, 9, 50)
    logits[1] = float("-inf")
    votes = operation.soft_vote(logits)
    torch.testing.assert_close(votes.sum(dim=1), torch.tensor([9.0, 0.0, 9.0]))
    assert not votes[1].any()


@pytest.mark.parametrize("operation", [cpu, reference], ids=["cpu", "reference"])
def test_no_candidates_at_all_gives_no_votes(operation):
    assert operation.soft_vote(torch.empty(2, 9, 0)).shape == (2, 0)


def test_nan_among_the_scores_spoils_its_own_row_only():
    logits = torch.randn(2, 3, 1500)
    logits[0, 1, 700] = float("nan")
    expected = reference.soft_vote(logits)
    votes = cpu.soft_vote(logits.clone())
    torch.testing.assert_close(votes[1], expected[1])
