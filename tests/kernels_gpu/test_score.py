"""Scores and votes of the Triton kernels are those of the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import triton

from tests.kernels.cases import Case
from tests.kernels_gpu.cases import (
    DEVICE,
    DTYPES,
    SHAPES,
    columns_for,
    device_cache,
    empty_columns,
    int32,
    unpacked,
)
from vllm_tokenselect.kernels.score import gpu, reference
from vllm_tokenselect.kernels.vote import gpu as vote_gpu
from vllm_tokenselect.kernels.vote import gpu_rescoring
from vllm_tokenselect.kernels.vote import reference as vote_reference

KEY_SCALE = 0.7
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # of fp32; a query that is rounded to bf16 misses it


@dataclass(frozen=True)
class Step:
    """Rows to score, and how they are handed to the kernel."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    row_seq: torch.Tensor
    tiles: torch.Tensor
    start: int
    ends: torch.Tensor
    scale: float = 0.125
    query_start: torch.Tensor | None = None
    rows_per_tile: int | None = None
    programs: int | None = None

    @property
    def asking(self) -> torch.Tensor:
        """The query of each row."""
        return self.query if self.query_start is None else self.query[self.query_start.long()]


def tiles_of_one(row_seq: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(row_seq), dtype=torch.int32, device=DEVICE)
    return torch.stack([row_seq, rows, torch.ones_like(rows)], dim=1)


def run(step: Step) -> tuple[gpu.Scores, torch.Tensor]:
    """What the kernels make of the step, in buffers that were full of NaNs; and the votes."""
    rows, heads = len(step.ends), step.query.shape[1]
    columns = columns_for((step.ends - step.start).tolist())
    first, last = columns.starts[[0, -1]].tolist()
    logits = empty_columns(last - first, heads)
    maxima = torch.full((rows, heads, gpu.NUM_PARTS), float("nan"), device=DEVICE)
    scores = gpu.Scores(logits, columns, maxima, maxima.clone(), step.start, step.ends)
    quantized = step.kv_cache.dtype.itemsize == 1
    gpu.score_paged_keys(
        query=step.query,
        kv_cache=step.kv_cache,
        block_table=step.block_table,
        tiles=step.tiles,
        rows_per_tile=step.rows_per_tile or int(step.tiles[:, 2].max()),
        scale=step.scale,
        key_scale=torch.tensor([KEY_SCALE], device=DEVICE) if quantized else None,
        scores=scores,
        query_start=step.query_start,
        programs=step.programs,
    )
    votes = torch.full((last + 4,), float("nan"), device=DEVICE)
    vote_gpu.soft_vote(scores, votes)
    assert logits[:, last - first :].isnan().all()
    assert votes[:first].isnan().all()
    assert votes[last:].isnan().all()
    by_row = unpacked(logits, columns, first)
    return replace(scores, logits=by_row), unpacked(votes, columns)


def defined_scores(step: Step) -> torch.Tensor:
    quantized = step.kv_cache.dtype.itemsize == 1
    return reference.score_paged_keys(
        step.asking.float(),
        step.kv_cache.float(),
        step.block_table,
        step.row_seq,
        step.start,
        step.ends,
        step.scale * (KEY_SCALE if quantized else 1.0),
    )


def assert_same_scores_and_votes(step: Step) -> tuple[gpu.Scores, torch.Tensor]:
    """Compare logits below each row's end, the maxima and sums of their parts, and the votes."""
    scores, votes = run(step)
    expected = defined_scores(step)
    expected_votes = vote_reference.soft_vote(expected)
    for row, end in enumerate(step.ends.tolist()):
        own = max(end - step.start, 0)
        logits = expected[row, :, :own]
        torch.testing.assert_close(scores.logits[row, :, :own], logits, **TOLERANCE)
        behind = triton.cdiv(own, 4) * 4  # four scores are stored at a time
        assert scores.logits[row, :, behind:].isnan().all(), "written past the row's end"
        torch.testing.assert_close(votes[row, :own], expected_votes[row, :own], **TOLERANCE)
        assert votes[row, own:].isnan().all()
        if own:
            assert_parts(scores.maxima[row], scores.sums[row], logits)
    return scores, votes


def assert_parts(maxima: torch.Tensor, sums: torch.Tensor, logits: torch.Tensor) -> None:
    """Each part of a row has its own maximum and sum; those behind the row's end are empty."""
    length = logits.shape[1]
    full = gpu.NUM_PARTS * gpu.SMALLEST_PART
    size = gpu.SMALLEST_PART * triton.next_power_of_2(triton.cdiv(length, full))
    parts = logits.split(size, dim=1)
    assert len(parts) <= gpu.NUM_PARTS
    for number, part in enumerate(parts):
        largest = part.max(dim=1).values
        torch.testing.assert_close(maxima[:, number], largest, **TOLERANCE)
        total = (part - largest[:, None]).exp().sum(dim=1)
        torch.testing.assert_close(sums[:, number], total, rtol=1e-3, atol=1e-3)
    assert (maxima[:, len(parts) :] == float("-inf")).all()
    assert (sums[:, len(parts) :] == 0).all()


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_mean_queries_score_as_the_definition_says(case: Case, layout: str):
    kv_cache, block_table = device_cache(case, layout)
    query = torch.randn(case.rows, case.num_heads, case.head_size, device=DEVICE)
    ends = torch.randint(40, case.tokens, (case.rows,), dtype=torch.int32, device=DEVICE)
    ends[0] = case.tokens  # in the middle of a block
    row_seq = torch.arange(case.rows, dtype=torch.int32, device=DEVICE)
    tiles = tiles_of_one(row_seq)
    assert_same_scores_and_votes(
        Step(query, kv_cache, block_table, row_seq, tiles, 19, ends, scale=0.1)
    )


@pytest.mark.parametrize(
    ("query_dtype", "dtype"),
    [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp8"), ("fp16", "fp8")],
)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8], ids="GQA {}".format)
def test_rows_of_one_query_ask_with_it_where_it_lies(group: int, query_dtype: str, dtype: str):
    case = Case(3, 150, 2 * group, 2, 48, 16, dtype)
    kv_cache, block_table = device_cache(case)
    # As a model hands it over: a slice of the projection.
    projected = torch.randn(5, (2 * group + 4) * 48, device=DEVICE).to(DTYPES[query_dtype])
    query = projected[:, : 2 * group * 48].view(5, 2 * group, 48)
    row_seq = int32(0, 1, 2)
    assert_same_scores_and_votes(
        Step(
            query=query,
            kv_cache=kv_cache,
            block_table=block_table,
            row_seq=row_seq,
            tiles=tiles_of_one(row_seq),
            start=7,
            ends=int32(150, 7, 101),
            query_start=int32(4, 3, 1),
        )
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [
        (3, 3, 64),
        (6, 2, 64),
        (7, 1, 64),
        (8, 1, 64),
        (20, 1, 512),  # several programs share the 100 lines of a tile
    ],
)
def test_rows_of_a_request_share_a_tile_and_each_ends_at_its_own_candidate(heads, kv_heads, size):
    case = Case(2, 400, heads, kv_heads, size, 32, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(12, heads, size, device=DEVICE)
    row_seq = int32(*[1] * 5, *[0] * 7)
    tiles = int32(1, 0, 5, 0, 5, 4, 0, 9, 3).view(3, 3)
    ends = int32(300, 301, 302, 390, 399, *range(200, 207))
    assert_same_scores_and_votes(Step(query, kv_cache, block_table, row_seq, tiles, 32, ends))


def test_rows_without_candidates_and_padded_rows_write_nothing():
    case = Case(3, 200, 6, 2, 64, 32, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(3, 6, 64, device=DEVICE)
    tiles = int32(0, 0, 1, 1, 1, 1, 2, 2, 1, 0, 0, 0).view(4, 3)
    step = Step(query, kv_cache, block_table, int32(0, 1, 2), tiles, 64, int32(64, 150, 0))
    scores, _ = assert_same_scores_and_votes(step)
    for row in (0, 2):
        assert scores.maxima[row].isnan().all()
        assert scores.sums[row].isnan().all()


def few_parts(monkeypatch: pytest.MonkeyPatch, parts: int = 4) -> None:
    """So that parts grow within a few hundred candidates."""
    for module in (gpu, vote_gpu, gpu_rescoring):
        monkeypatch.setattr(module, "NUM_PARTS", parts)


LENGTHS = [1, 129, 512, 513, 1030]


def rows_over_one_text() -> Step:
    """Rows of one request, each with another number of candidates."""
    case = Case(1, 1060, 3, 1, 64, 16, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(len(LENGTHS), 3, 64, generator=torch.Generator().manual_seed(0))
    return Step(
        query=query.to(DEVICE),
        kv_cache=kv_cache,
        block_table=block_table,
        row_seq=int32(*[0] * len(LENGTHS)),
        tiles=int32(0, 0, len(LENGTHS)).view(1, 3),
        start=3,
        ends=int32(*(3 + length for length in LENGTHS)),
        rows_per_tile=len(LENGTHS),
    )


def test_parts_grow_with_their_own_row(monkeypatch: pytest.MonkeyPatch):
    few_parts(monkeypatch)
    assert_same_scores_and_votes(rows_over_one_text())


@pytest.mark.parametrize("programs", [1, 3])
def test_a_row_has_the_same_bits_beside_any_rows_and_for_any_number_of_programs(
    programs: int, monkeypatch: pytest.MonkeyPatch
):
    few_parts(monkeypatch)
    together = rows_over_one_text()
    expected = run(together)
    reordered = torch.tensor([3, 0, 4, 2, 1], device=DEVICE)
    everyone = int32(*range(len(LENGTHS)))
    apart = tiles_of_one(0 * everyone)
    ways = {
        "as they are": (everyone.long(), together.tiles),
        "each in a tile alone": (everyone.long(), apart),
        "beside others": (reordered, int32(0, 0, 2, 0, 2, 1, 0, 3, 2).view(3, 3)),
    }
    for way, (order, tiles) in ways.items():
        scores, votes = run(
            replace(
                together,
                query=together.query[order],
                ends=together.ends[order],
                tiles=tiles,
                programs=programs,
            )
        )
        for position, row in enumerate(order.tolist()):
            for actual, wanted in (
                (scores.logits, expected[0].logits),
                (scores.maxima, expected[0].maxima),
                (scores.sums, expected[0].sums),
                (votes, expected[1]),
            ):
                own = slice(LENGTHS[row] if actual.shape[-1] > gpu.NUM_PARTS else None)
                assert torch.equal(actual[position, ..., own], wanted[row, ..., own]), way


def test_a_query_that_is_its_own_mean_has_the_same_bits_as_the_mean():
    together = rows_over_one_text()
    query = together.query.half()
    starts = int32(*range(len(LENGTHS)))
    expected, _ = run(replace(together, query=query, query_start=starts))
    scores, _ = run(replace(together, query=query.float()))
    assert torch.equal(scores.sums, expected.sums)
    assert torch.equal(scores.maxima, expected.maxima)


@pytest.mark.parametrize("tokens", [40, 470, 4300])
def test_the_number_of_programs_changes_no_bit(tokens: int):
    case = Case(1, tokens + 30, 7, 1, 64, 16, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(1, 7, 64, device=DEVICE)
    tiles = int32(0, 0, 1).view(1, 3)
    step = Step(query, kv_cache, block_table, int32(0), tiles, 3, int32(tokens), scale=0.2)
    kinds = [
        assert_same_scores_and_votes(replace(step, programs=programs)) for programs in (1, 2, 7, 64)
    ]
    for scores, votes in kinds[1:]:
        assert torch.equal(scores.maxima, kinds[0][0].maxima)
        assert torch.equal(scores.sums, kinds[0][0].sums)
        assert torch.equal(votes.nan_to_num(), kinds[0][1].nan_to_num())


def test_scores_far_apart_do_not_overflow():
    case = Case(1, 300, 2, 1, 64, 16, "fp32")
    kv_cache, block_table = device_cache(case)
    query = 100 * torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tiles = int32(0, 0, 1).view(1, 3)
    assert_same_scores_and_votes(
        Step(query, kv_cache, block_table, int32(0), tiles, 0, int32(300), scale=1.0)
    )
