"""Scores and votes of the Triton kernels are those of the definition."""

import pytest
import torch

from tests.kernels.cases import Case
from tests.kernels_gpu.cases import DEVICE, SHAPES, device_cache, int32
from vllm_tokenselect.kernels.gpu_launch import INTERPRETED
from vllm_tokenselect.kernels.score import gpu, reference
from vllm_tokenselect.kernels.vote import gpu as vote_gpu
from vllm_tokenselect.kernels.vote import reference as vote_reference

KEY_SCALE = 0.7


def assert_same_scores_and_votes(
    query, kv_cache, block_table, row_seq, tiles, start, ends, scale, programs=None
):
    """Compare logits below each row's end, their running maxima and sums, and the votes."""
    rows, heads = query.shape[:2]
    quantized = kv_cache.dtype.itemsize == 1
    width = max(int(ends.max()) - start, 1) + 5
    logits = torch.full((rows, heads, width), float("nan"), device=DEVICE)
    maxima = torch.full((rows, heads, gpu.NUM_PARTS), float("nan"), device=DEVICE)
    votes = torch.full((rows, width), float("nan"), device=DEVICE)
    key_scale = torch.tensor([KEY_SCALE], device=DEVICE) if quantized else None
    sums = torch.full_like(maxima, float("nan"))
    scores = gpu.Scores(logits, maxima, sums, start, ends)
    gpu.score_paged_keys(
        query=query,
        kv_cache=kv_cache,
        block_table=block_table,
        tiles=tiles,
        rows_per_tile=int(tiles[:, 2].max()),
        scale=scale,
        key_scale=key_scale,
        scores=scores,
        programs=programs,
    )
    vote_gpu.soft_vote(scores, votes)

    # Products of bf16 or fp8 keys with a query that was rounded to bf16.
    exact = kv_cache.dtype == torch.float32 or INTERPRETED
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if exact else {"rtol": 2e-2, "atol": 2e-2}
    true_scale = scale * (KEY_SCALE if quantized else 1.0)
    expected = reference.score_paged_keys(
        query, kv_cache.float(), block_table, row_seq, start, ends, true_scale
    )
    expected_votes = vote_reference.soft_vote(expected)
    for row, end in enumerate(ends.tolist()):
        own = max(end - start, 0)
        torch.testing.assert_close(logits[row, :, :own], expected[row, :, :own], **tolerance)
        assert logits[row, :, own:].isnan().all(), "written past the row's end"
        torch.testing.assert_close(votes[row, :own], expected_votes[row, :own], **tolerance)
        assert votes[row, own:].isnan().all()
        if own:
            torch.testing.assert_close(
                scores.maxima[row].max(dim=1).values,
                expected[row, :, :own].max(dim=1).values,
                **tolerance,
            )
    return scores, votes


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_decoding_rows_score_as_the_definition_says(case: Case, layout: str):
    kv_cache, block_table = device_cache(case, layout)
    query = torch.randn(case.rows, case.num_heads, case.head_size, device=DEVICE)
    ends = torch.randint(40, case.tokens, (case.rows,), dtype=torch.int32, device=DEVICE)
    ends[0] = case.tokens  # in the middle of a block
    row_seq = torch.arange(case.rows, dtype=torch.int32, device=DEVICE)
    tiles = torch.stack([row_seq, row_seq, torch.ones_like(row_seq)], dim=1)
    assert_same_scores_and_votes(query, kv_cache, block_table, row_seq, tiles, 19, ends, 0.1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [
        (3, 3, 64),
        (6, 2, 64),
        (7, 1, 64),
        (8, 1, 64),
        (20, 1, 512),  # two programs share the 100 lines of a tile
    ],
)
def test_rows_of_a_request_share_a_tile_and_each_ends_at_its_own_candidate(heads, kv_heads, size):
    case = Case(2, 400, heads, kv_heads, size, 32, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(12, heads, size, device=DEVICE)
    row_seq = int32(*[1] * 5, *[0] * 7)
    tiles = int32(1, 0, 5, 0, 5, 4, 0, 9, 3).view(3, 3)
    ends = int32(300, 301, 302, 390, 399, *range(200, 207))
    assert_same_scores_and_votes(query, kv_cache, block_table, row_seq, tiles, 32, ends, 0.125)


def test_rows_without_candidates_and_padded_rows_write_nothing():
    case = Case(3, 200, 6, 2, 64, 32, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(3, 6, 64, device=DEVICE)
    tiles = int32(0, 0, 1, 1, 1, 1, 2, 2, 1, 0, 0, 0).view(4, 3)
    ends = int32(64, 150, 0)
    assert_same_scores_and_votes(
        query=query,
        kv_cache=kv_cache,
        block_table=block_table,
        row_seq=int32(0, 1, 2),
        tiles=tiles,
        start=64,
        ends=ends,
        scale=0.125,
    )


@pytest.mark.parametrize("tokens", [40, 470, 4300])
def test_the_number_of_programs_changes_no_bit(tokens: int):
    case = Case(1, tokens + 30, 7, 1, 64, 16, "fp16")
    kv_cache, block_table = device_cache(case)
    query = torch.randn(1, 7, 64, device=DEVICE)
    kinds = [
        assert_same_scores_and_votes(
            query=query,
            kv_cache=kv_cache,
            block_table=block_table,
            row_seq=int32(0),
            tiles=int32(0, 0, 1).view(1, 3),
            start=3,
            ends=int32(tokens),
            scale=0.2,
            programs=programs,
        )
        for programs in (1, 2, 7, 64)
    ]
    for scores, votes in kinds[1:]:
        assert torch.equal(scores.maxima, kinds[0][0].maxima)
        assert torch.equal(scores.sums, kinds[0][0].sums)
        assert torch.equal(votes.nan_to_num(), kinds[0][1].nan_to_num())


def test_scores_far_apart_do_not_overflow():
    case = Case(1, 300, 2, 1, 64, 16, "fp32")
    kv_cache, block_table = device_cache(case)
    query = 100 * torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_same_scores_and_votes(
        query=query,
        kv_cache=kv_cache,
        block_table=block_table,
        row_seq=int32(0),
        tiles=int32(0, 0, 1).view(1, 3),
        start=0,
        ends=int32(300),
        scale=1.0,
    )
