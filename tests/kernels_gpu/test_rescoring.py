"""Votes of scores that are computed again are those of the definition, and nothing else is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import Case
from tests.kernels_gpu.cases import (
    DEVICE,
    SHAPES,
    columns_for,
    device_cache,
    int32,
    unpacked,
)
from tests.kernels_gpu.test_score import (
    KEY_SCALE,
    LENGTHS,
    TOLERANCE,
    Step,
    assert_parts,
    defined_scores,
    few_parts,
    rows_over_one_text,
)
from vllm_tokenselect.kernels.score import gpu as score_gpu
from vllm_tokenselect.kernels.vote import gpu_rescoring, reference


def run(step: Step, programs: int | None = None) -> tuple[score_gpu.Scores, torch.Tensor]:
    """What the kernels make of the step's mean queries, in buffers that were full of NaNs."""
    rows, heads = len(step.ends), step.query.shape[1]
    columns = columns_for((step.ends - step.start).tolist())
    first, last = columns.starts[[0, -1]].tolist()
    maxima = torch.full((rows, heads, score_gpu.NUM_PARTS), float("nan"), device=DEVICE)
    scores = score_gpu.Scores(None, columns, maxima, maxima.clone(), step.start, step.ends)
    quantized = step.kv_cache.dtype.itemsize == 1
    arguments = {
        "query": step.query,
        "kv_cache": step.kv_cache,
        "block_table": step.block_table,
        "tiles": step.tiles,
        "rows_per_tile": step.rows_per_tile or int(step.tiles[:, 2].max()),
        "scale": step.scale,
        "key_scale": torch.tensor([KEY_SCALE], device=DEVICE) if quantized else None,
        "scores": scores,
        "programs": step.programs,
    }
    score_gpu.score_paged_keys(**arguments)
    votes = torch.full((last + 4,), float("nan"), device=DEVICE)
    gpu_rescoring.vote_rescoring(**arguments | {"votes": votes, "programs": programs})
    assert votes[:first].isnan().all()
    assert votes[last:].isnan().all()
    return scores, unpacked(votes, columns)


def assert_votes_as_defined(step: Step, programs: int | None = None) -> torch.Tensor:
    """Compare the votes below each row's end, and the maxima and sums of its parts."""
    scores, votes = run(step, programs)
    logits = defined_scores(step)
    expected = reference.soft_vote(logits)
    for row, end in enumerate(step.ends.tolist()):
        own = max(end - step.start, 0)
        torch.testing.assert_close(votes[row, :own], expected[row, :own], **TOLERANCE)
        assert votes[row, own:].isnan().all(), "written past the row's end"
        if own:
            assert_parts(scores.maxima[row], scores.sums[row], logits[row, :, :own])
    return votes


def chunks(case: Case, row_seq: list[int], tiles: list[int], ends: list[int], **more) -> Step:
    """Mean queries of chunks, of which those of a tile follow each other."""
    kv_cache, block_table = device_cache(case)
    query = torch.randn(len(ends), case.num_heads, case.head_size, device=DEVICE)
    table = int32(*tiles).view(-1, 3)
    return Step(query, kv_cache, block_table, int32(*row_seq), table, 19, int32(*ends), **more)


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_votes_are_those_of_the_definition(case: Case, layout: str):
    step = chunks(case, [0, 1, 1], [0, 0, 1, 1, 1, 2], [case.tokens, 60, 101], scale=0.1)
    kv_cache, block_table = device_cache(case, layout)
    assert_votes_as_defined(replace(step, kv_cache=kv_cache, block_table=block_table))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
@pytest.mark.parametrize("group", range(1, 9), ids="GQA {}".format)
def test_all_heads_of_a_row_are_added_up_however_many_share_a_kv_head(group: int, dtype: str):
    case = Case(2, 170, 2 * group, 2, 48, 16, dtype)
    assert_votes_as_defined(chunks(case, [0, 0, 1], [0, 0, 2, 1, 2, 1], [170, 90, 150]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [
        (6, 2, 64, "fp16"),
        (20, 1, 512, "fp16"),  # programs share the rows of a tile, one each
        (20, 1, 512, "fp32"),  # and go through the heads of a KV head in two steps
    ],
)
def test_a_full_tile_is_shared_by_as_many_programs_as_it_takes(heads, kv_heads, size, dtype):
    case = Case(1, 150, heads, kv_heads, size, 16, dtype)
    rows = score_gpu.tile_rows(heads, kv_heads)
    ends = [100 + row for row in range(rows)]
    assert_votes_as_defined(chunks(case, [0] * rows, [0, 0, rows], ends, rows_per_tile=rows))


@pytest.mark.parametrize("candidates", [0, 1, 63, 64, 65, 129], ids="{} candidates".format)
def test_a_row_ends_anywhere(candidates: int):
    case = Case(1, 200, 6, 2, 64, 16, "fp16")
    ends = [19 + candidates, 19, 5]
    assert_votes_as_defined(chunks(case, [0] * 3, [0, 0, 3, 0, 0, 0], ends, rows_per_tile=16))


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_a_row_has_the_same_bits_beside_any_rows_and_for_any_number_of_programs(
    programs: int, monkeypatch: pytest.MonkeyPatch
):
    few_parts(monkeypatch)
    together = rows_over_one_text()
    _, expected = run(together, 2)
    order = torch.tensor([3, 0, 4, 2, 1], device=DEVICE)
    apart = int32(*[number for row in range(5) for number in (0, row, 1)]).view(5, 3)
    beside = int32(0, 0, 2, 0, 2, 1, 0, 3, 2).view(3, 3)
    for tiles in (apart, beside):
        query, ends = together.query[order], together.ends[order]
        _, votes = run(replace(together, query=query, ends=ends, tiles=tiles), programs)
        for position, row in enumerate(order.tolist()):
            own = slice(LENGTHS[row])
            assert torch.equal(votes[position, own], expected[row, own])


def test_scores_far_apart_do_not_overflow():
    case = Case(1, 300, 2, 1, 64, 16, "fp32")
    step = chunks(case, [0], [0, 0, 1], [300], scale=1.0)
    assert_votes_as_defined(replace(step, query=30 * step.query))


def test_what_lies_behind_a_tile_is_not_read():
    step = chunks(Case(1, 200, 6, 2, 64, 16, "fp16"), [0, 0], [0, 0, 2], [150, 90])
    expected = assert_votes_as_defined(step)
    kv_cache = step.kv_cache.clone()
    behind = step.block_table[0, 150 // 16].long()
    kv_cache[behind, :, 0, 150 % 16 :] = float("nan")
    _, votes = run(replace(step, kv_cache=kv_cache))
    assert torch.equal(votes.nan_to_num(), expected.nan_to_num())
