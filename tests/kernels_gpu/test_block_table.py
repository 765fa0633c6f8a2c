"""The Triton kernel's sparse block table is that of the definition, entry by entry."""

import pytest
import torch

from tests.kernels_gpu.cases import DEVICE, int32
from vllm_tokenselect.kernels.block_table import gpu, reference
from vllm_tokenselect.method.settings import FULL_ATTENTION

UNTOUCHED = -7


def assert_same_table(
    votes, block_table, row_seq, n_init, top_k, ends, context, block_size, parts=1
):
    if isinstance(top_k, int):
        top_k = torch.full_like(ends, top_k)
    arguments = (votes, block_table, row_seq, n_init, top_k, ends, context, block_size)
    tables = []
    for operation in (gpu, reference):
        slots = torch.full((len(ends), int(context.max()) + 5), UNTOUCHED, device=DEVICE)
        slots, lengths = slots.to(torch.int32), int32(*[UNTOUCHED] * len(ends))
        more = () if operation is reference else (gpu.TableScratch(len(ends), DEVICE), parts)
        operation.build_sparse_block_table(*arguments, slots, lengths, *more)
        tables.append((slots, lengths))
    assert torch.equal(tables[0][1], tables[1][1])
    assert torch.equal(tables[0][0], tables[1][0])
    return tables[0]


def identity_table(rows: int, block_size: int) -> torch.Tensor:
    """One block table for all rows, in which a slot is its position."""
    line = torch.arange(8192 // block_size, dtype=torch.int32, device=DEVICE)
    return line.repeat(rows, 1)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("top_k", [1, 60, 1000])
@pytest.mark.parametrize("parts", [1, 2])
def test_tables_are_those_of_the_definition(block_size: int, top_k: int, parts: int):
    width = -(-2200 // block_size)
    blocks = torch.randperm(4 * width, device=DEVICE)[: 3 * width]
    block_table = blocks.view(3, width).to(torch.int32)
    ends = int32(501, 2077, 19, 1300, 2000)
    context = ends + int32(70, 1, 100, 33, 128)
    votes = torch.rand(5, 2100, device=DEVICE) ** 8
    votes[4] = (votes[4] * 50).round() / 50  # many ties
    assert_same_table(
        votes, block_table, int32(2, 0, 1, 2, 2), 19, top_k, ends, context, block_size, parts
    )


@pytest.mark.parametrize("parts", [1, 3, 64])
def test_more_candidates_than_a_program_reads_at_once(parts: int):
    votes = torch.rand(1, 7001, device=DEVICE).round(decimals=3)
    assert_same_table(
        votes, identity_table(1, 32), int32(0), 128, 2048, int32(7129), int32(7700), 32, parts
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("vote", [0.0, 1e-42, 0.37, float("inf"), float("nan")])
def test_ties_go_to_the_lowest_positions(vote: float, parts: int):
    # More than a program reads at once, so that the ties lie in both parts.
    votes = torch.full((1, 4500), vote, device=DEVICE)
    slots, lengths = assert_same_table(
        votes,
        identity_table(1, 16),
        row_seq=int32(0),
        n_init=16,
        top_k=2500,
        ends=int32(4516),
        context=int32(4530),
        block_size=16,
        parts=parts,
    )
    assert slots[0, : lengths[0]].tolist() == [*range(16 + 2500), *range(4516, 4530)]


def test_scratch_of_an_earlier_step_does_not_matter():
    scratch = gpu.TableScratch(1, DEVICE)
    tables = []
    for seed in (0, 1, 0):
        votes = torch.rand(1, 5000, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        slots, lengths = torch.zeros(1, 400, dtype=torch.int32, device=DEVICE), int32(0)
        gpu.build_sparse_block_table(
            votes=votes,
            block_table=identity_table(1, 16),
            row_seq=int32(0),
            n_init=16,
            top_k=int32(300),
            candidate_ends=int32(5016),
            context_ends=int32(5017),
            block_size=16,
            slots=slots,
            lengths=lengths,
            scratch=scratch,
            parts=3,
        )
        tables.append(slots)
    assert torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], tables[1])


def test_a_nan_vote_is_the_lowest():
    votes = torch.rand(1, 500, device=DEVICE) + 0.1
    votes[0, 3] = float("nan")
    slots, lengths = assert_same_table(
        votes, identity_table(1, 16), int32(0), 16, 499, int32(516), int32(530), 16
    )
    assert 16 + 3 not in slots[0, : lengths[0]].tolist()


def test_dense_and_padded_rows_need_no_votes():
    slots, lengths = assert_same_table(
        None,
        identity_table(3, 16),
        int32(0, 1, 0),
        16,
        50,
        int32(-400, 66, 0),
        int32(112, 70, 0),
        16,
    )
    assert lengths.tolist() == [112, 70, 0]
    assert (slots[2] == UNTOUCHED).all()


@pytest.mark.parametrize("parts", [1, 3])
def test_every_row_selects_as_many_as_its_own_top_k(parts: int):
    votes = torch.rand(5, 5000, device=DEVICE).round(decimals=2)
    top_k = int32(1, 4999, 5000, FULL_ATTENTION, 700)
    ends, context = int32(*[5016] * 5), int32(*[5030] * 4, 5100)
    slots, lengths = assert_same_table(
        votes, identity_table(5, 16), int32(0, 1, 2, 3, 4), 16, top_k, ends, context, 16, parts
    )
    assert lengths.tolist() == [16 + 1 + 14, 16 + 4999 + 14, 5030, 5030, 16 + 700 + 84]
    assert slots[3, :5030].tolist() == [*range(5030)]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("context", [0, 1, 2049, 8000])
def test_a_whole_context_is_written_by_all_parts_of_a_row(context: int, parts: int):
    slots, lengths = assert_same_table(
        None,
        identity_table(1, 32),
        row_seq=int32(0),
        n_init=128,
        top_k=FULL_ATTENTION,
        ends=int32(context - 513),
        context=int32(context),
        block_size=32,
        parts=parts,
    )
    assert lengths.tolist() == [context]
    assert slots[0, :context].tolist() == [*range(context)]
