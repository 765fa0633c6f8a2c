"""The Triton kernel's sparse block table is that of the definition, entry by entry."""

import pytest
import torch

from tests.kernels_gpu.cases import DEVICE, columns_for, int32, packed
from vllm_tokenselect.kernels.block_table import gpu, gpu_digits, reference
from vllm_tokenselect.kernels.columns import Columns
from vllm_tokenselect.method.settings import FULL_ATTENTION

UNTOUCHED = -7
PART = 1024


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch):
    """An emulator takes as long as a part is."""
    monkeypatch.setattr(gpu_digits, "PART_TOKENS", PART)


def scratch_for(columns: Columns) -> gpu.TableScratch:
    """For votes in these columns; what lies in it means nothing."""
    scratch = gpu.TableScratch(int(columns.starts[-1]), columns.num_rows, DEVICE)
    for tensor in vars(scratch).values():
        tensor.fill_(9999)
    return scratch


def assert_same_table(votes, block_table, row_seq, n_init, top_k, ends, context, block_size):
    if isinstance(top_k, int):
        top_k = torch.full_like(ends, top_k)
    arguments = (votes, block_table, row_seq, n_init, top_k, ends, context, block_size)
    tables = []
    for operation in (gpu, reference):
        slots = torch.full((len(ends), int(context.max()) + 5), UNTOUCHED, device=DEVICE)
        slots, lengths = slots.to(torch.int32), int32(*[UNTOUCHED] * len(ends))
        if operation is reference:
            reference.build_sparse_block_table(*arguments, slots, lengths)
        else:
            columns = columns_for([0 if votes is None else votes.shape[1]] * len(ends))
            own = None if votes is None else packed(votes, columns)
            table = arguments[1:]
            scratch = scratch_for(columns)
            gpu.build_sparse_block_table(own, columns, *table, slots, lengths, scratch)
        tables.append((slots, lengths))
    assert torch.equal(tables[0][1], tables[1][1])
    assert torch.equal(tables[0][0], tables[1][0])
    return tables[0]


def identity_table(rows: int, block_size: int, tokens: int = 8 * PART) -> torch.Tensor:
    """One block table for all rows, in which a slot is its position."""
    line = torch.arange(tokens // block_size, dtype=torch.int32, device=DEVICE)
    return line.repeat(rows, 1)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("top_k", [1, 60, 1000])
def test_tables_are_those_of_the_definition(block_size: int, top_k: int):
    width = -(-2200 // block_size)
    blocks = torch.randperm(4 * width, device=DEVICE)[: 3 * width]
    block_table = blocks.view(3, width).to(torch.int32)
    ends = int32(501, 2077, 19, 1300, 2000)
    context = ends + int32(70, 1, 100, 33, 128)
    votes = torch.rand(5, 2100, device=DEVICE) ** 8
    votes[4] = (votes[4] * 50).round() / 50  # many ties
    assert_same_table(
        votes, block_table, int32(2, 0, 1, 2, 2), 19, top_k, ends, context, block_size
    )


def test_a_row_of_more_parts_than_a_program_adds_up_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_digits, "PART_TOKENS", 64)
    candidates = 64 * (gpu_digits.PARTS_PER_STEP + 2) + 5
    votes = torch.rand(1, candidates, device=DEVICE).round(decimals=2)
    assert_same_table(
        votes,
        identity_table(1, 32),
        row_seq=int32(0),
        n_init=128,
        top_k=2048,
        ends=int32(candidates + 128),
        context=int32(candidates + 128 + 571),
        block_size=32,
    )


@pytest.mark.parametrize("candidates", [PART - 1, PART, PART + 1, 2 * PART, 3 * PART - 700])
def test_equal_votes_lie_on_both_sides_of_a_border_of_parts(candidates: int):
    """Of few kinds of votes, so that the threshold's ties are in every part."""
    votes = torch.randint(3, (1, candidates), device=DEVICE).float() / 3
    sizes = {1, PART // 2, PART - 1, PART, PART + 1, 2 * PART - 1, candidates - 1}
    top_k = int32(*sorted(size for size in sizes if size < candidates))
    rows = len(top_k)
    assert_same_table(
        votes.repeat(rows, 1),
        identity_table(rows, 16),
        row_seq=int32(*range(rows)),
        n_init=16,
        top_k=top_k,
        ends=int32(*[candidates + 16] * rows),
        context=int32(*[candidates + 30] * rows),
        block_size=16,
    )


def test_any_bits_are_ordered_as_the_definition_orders_them():
    """Subnormal, huge and infinite votes, those that differ in one bit only, and NaNs of either sign."""
    bits = torch.randint(-(2**31), 2**31, (4, 2 * PART), device=DEVICE).to(torch.int32)
    bits[0] &= 0x7FFFFF  # subnormal
    bits[1] = (bits[1] & 0x7F) << 16 | 0x3F800000  # one exponent
    bits[2] = (bits[2] & 0xFF) << 23  # powers of two, and infinity
    bits[3] = torch.where(bits[3] < 0, 0x7F800000 | bits[3], bits[3])  # negative only as a NaN
    votes = bits.view(torch.float32)
    for top_k in (1, PART + 70):
        assert_same_table(
            votes,
            identity_table(4, 16),
            row_seq=int32(0, 1, 2, 3),
            n_init=16,
            top_k=top_k,
            ends=int32(*[2 * PART + 16 - 3] * 4),
            context=int32(*[2 * PART + 30] * 4),
            block_size=16,
        )


@pytest.mark.parametrize("vote", [0.0, 1e-42, 0.37, float("inf"), float("nan")])
def test_ties_go_to_the_lowest_positions(vote: float):
    candidates, top_k = 4 * PART + 404, 2 * PART + 404
    votes = torch.full((1, candidates), vote, device=DEVICE)
    slots, lengths = assert_same_table(
        votes,
        identity_table(1, 16),
        row_seq=int32(0),
        n_init=16,
        top_k=top_k,
        ends=int32(candidates + 16),
        context=int32(candidates + 30),
        block_size=16,
    )
    local = range(candidates + 16, candidates + 30)
    assert slots[0, : lengths[0]].tolist() == [*range(16 + top_k), *local]


def test_a_row_is_the_same_alone_as_beside_any_neighbors():
    """Rows that are dense, padded, of one part and of several."""
    candidates = int32(3 * PART + 7, 0, 200, PART, 40, 2 * PART)
    top_k, votes = int32(300, 0, 60, 60, 60, 2000), torch.rand(6, 3 * PART + 9, device=DEVICE)
    ends = candidates + 16
    context = torch.where(candidates > 0, ends + 14, 0)
    table = identity_table(6, 16)
    seqs = int32(*range(6))
    slots, lengths = assert_same_table(votes, table, seqs, 16, top_k, ends, context, 16)
    for row in range(6):
        one = slice(row, row + 1)
        arguments = (votes[one], table, seqs[one], 16, top_k[one], ends[one], context[one], 16)
        alone, length = assert_same_table(*arguments)
        assert torch.equal(length, lengths[one])
        assert torch.equal(alone[0, : length[0]], slots[row, : length[0]])


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


def test_every_row_selects_as_many_as_its_own_top_k():
    votes = torch.rand(5, 5000, device=DEVICE).round(decimals=2)
    top_k = int32(1, 4999, 5000, FULL_ATTENTION, 700)
    ends, context = int32(*[5016] * 5), int32(*[5030] * 4, 5100)
    slots, lengths = assert_same_table(
        votes, identity_table(5, 16), int32(0, 1, 2, 3, 4), 16, top_k, ends, context, 16
    )
    assert lengths.tolist() == [16 + 1 + 14, 16 + 4999 + 14, 5030, 5030, 16 + 700 + 84]
    assert slots[3, :5030].tolist() == [*range(5030)]


@pytest.mark.parametrize("context", [0, 1, 2049, 8000])
def test_a_whole_context_is_written_by_all_programs_of_a_row(context: int):
    slots, lengths = assert_same_table(
        None,
        identity_table(1, 32),
        row_seq=int32(0),
        n_init=128,
        top_k=FULL_ATTENTION,
        ends=int32(context - 513),
        context=int32(context),
        block_size=32,
    )
    assert lengths.tolist() == [context]
    assert slots[0, :context].tolist() == [*range(context)]
