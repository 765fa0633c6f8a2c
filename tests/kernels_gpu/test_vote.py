"""Votes of the Triton kernel are those of the definition, and so are the counts of their first digits."""

from __future__ import annotations

import pytest
import torch

from tests.kernels_gpu.cases import DEVICE, columns_for, empty_columns, int32, packed, unpacked
from vllm_tokenselect.kernels.block_table import gpu_digits
from vllm_tokenselect.kernels.block_table.reference import order_keys
from vllm_tokenselect.kernels.score.gpu import NUM_PARTS, Scores
from vllm_tokenselect.kernels.vote import gpu, reference

PART, START, UNTOUCHED = 1024, 19, -7


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch):
    """An emulator takes as long as a part is."""
    monkeypatch.setattr(gpu_digits, "PART_TOKENS", PART)


def scores_of(logits: torch.Tensor, candidates: list[int]) -> Scores:
    """As they are left for the vote: NaNs behind each row's candidates, parts of some size."""
    rows, heads, width = logits.shape
    columns = columns_for(candidates)
    maxima = torch.full((rows, heads, NUM_PARTS), float("-inf"), device=DEVICE)
    sums = torch.zeros_like(maxima)
    logits, size = logits.clone(), width // NUM_PARTS + 7
    for row, count in enumerate(candidates):
        for part, own in enumerate(logits[row, :, :count].split(size, dim=1) if count else ()):
            maxima[row, :, part] = own.amax(1)
            sums[row, :, part] = (own - own.amax(1, keepdim=True)).exp().sum(1)
        logits[row, :, count:] = float("nan")
    first, last = columns.starts[[0, -1]].tolist()
    by_head = empty_columns(last - first, heads)
    for head, own in enumerate(logits.unbind(1)):
        by_head[head, : last - first] = packed(own, columns)[first:last]
    return Scores(by_head, columns, maxima, sums, START, int32(*candidates) + START)


def vote(scores: Scores, counts: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Votes of each row, and the lines of its parts with those that follow up to the next row's."""
    columns = scores.columns
    last = int(columns.starts[-1])
    votes = torch.full((last + 4,), float("nan"), device=DEVICE)
    lines = (gpu_digits.num_lines(last, columns.num_rows), gpu_digits.EXPONENTS)
    exponents = torch.full(lines, UNTOUCHED, dtype=torch.int16, device=DEVICE)
    gpu.soft_vote(scores, votes, exponents if counts else None)
    firsts = columns.starts[:-1] // PART + torch.arange(columns.num_rows, device=DEVICE)
    lines_of_rows = exponents.tensor_split(firsts[1:].cpu().long())
    assert (exponents[: firsts[0]] == UNTOUCHED).all()
    return unpacked(votes, columns), [lines_of_rows[0][firsts[0] :], *lines_of_rows[1:]]


def assert_counted(votes: torch.Tensor, exponents: torch.Tensor) -> None:
    """Every part of a row has counted its own votes; those behind the row's end have counted nothing."""
    parts = votes.split(PART) if len(votes) else ()
    for part, own in enumerate(parts):
        digits = order_keys(own).long() >> gpu_digits.MANTISSA_BITS
        expected = digits.bincount(minlength=gpu_digits.EXPONENTS)
        assert torch.equal(exponents[part].long(), expected)
    assert (exponents[len(parts) :] == UNTOUCHED).all()


@pytest.mark.parametrize("heads", [1, 3, 8, 9, 28])
def test_votes_and_counts_are_those_of_the_definition(heads: int):
    candidates = [2 * PART + 3, 0, 1, PART - 1, PART, PART + 1]
    logits = 9 * torch.randn(len(candidates), heads, 2 * PART + 64, device=DEVICE)
    votes, exponents = vote(scores_of(logits, candidates))
    for row, count in enumerate(candidates):
        expected = reference.soft_vote(logits[row : row + 1, :, :count])[0] if count else []
        torch.testing.assert_close(votes[row, :count], torch.as_tensor(expected, device=DEVICE))
        assert votes[row, count:].isnan().all(), "written past the row's end"
        assert_counted(votes[row, :count], exponents[row])


def test_a_nan_among_the_scores_is_counted_as_the_lowest_vote():
    logits = torch.randn(1, 3, 64, device=DEVICE)
    scores = scores_of(logits, [64])
    scores.logits[1, 5] = float("nan")
    votes, exponents = vote(scores)
    assert votes[0].isnan().tolist() == [token == 5 for token in range(64)]
    assert_counted(votes[0], exponents[0])
    assert exponents[0][0, 0] == 1


def test_votes_need_not_be_counted():
    logits = torch.randn(1, 9, 400, device=DEVICE)
    votes, exponents = vote(scores_of(logits, [400]), counts=False)
    torch.testing.assert_close(votes, reference.soft_vote(logits))
    assert (exponents[0] == UNTOUCHED).all()


def test_a_row_votes_the_same_bits_beside_any_neighbors():
    candidates = [PART + 70, 0, 90, 2 * PART]
    logits = torch.randn(4, 9, 2 * PART + 64, device=DEVICE)
    votes, exponents = vote(scores_of(logits, candidates))
    for row, count in enumerate(candidates):
        alone, counted = vote(scores_of(logits[row : row + 1], [count]))
        assert torch.equal(alone[0, :count], votes[row, :count])
        parts = gpu_digits.num_parts(count)
        assert torch.equal(counted[0][:parts], exponents[row][:parts])
