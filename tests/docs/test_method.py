"""`docs/method.md` says what the code does: the defaults, and the worked example."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.docs.pages import rows
from tests.oracle.model import Selection, attended_positions, query_chunks
from vllm_tokenselect.kernels.block_table.reference import build_sparse_block_table, order_keys
from vllm_tokenselect.kernels.score.reference import score_paged_keys
from vllm_tokenselect.kernels.vote.reference import soft_vote
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method

PAGE = "docs/method.md"
METHOD = Method(
    top_k=2, n_init=1, n_local=2, query_chunk=4, tail_queries=2, refresh_interval=1, vote="local"
)
PROMPT = 12


def test_the_defaults_are_those_of_the_code():
    written = {setting: default for setting, default, _ in rows(PAGE, "setting", "default")}
    assert written == {name: str(value) for name, value in asdict(Method()).items()}


@pytest.mark.parametrize(("block_size", "chunk"), [(128, 512), (80, 480), (528, 264), (16, 512)])
def test_query_chunks_line_up_with_blocks(block_size, chunk):
    assert Method().for_blocks(block_size).query_chunk == chunk


def test_votes_are_compared_in_16_bits():
    half, alike, higher = order_keys(torch.tensor([0.5, 0.503, 0.504])).tolist()
    assert half == alike < higher


@pytest.fixture
def keys() -> torch.Tensor:
    """Of the example, fp32 [positions]."""
    [[name, *numbers]] = rows(PAGE, "position", "0")
    assert name == "key"
    return torch.tensor([float(number) for number in numbers])


@pytest.fixture
def example() -> list[tuple[range, list[int], str, list[int]]]:
    """Chunk, candidates, selected, attended."""

    def positions(text: str) -> list[int]:
        return [int(word) for word in text.split() if word.isdigit()]

    lines = rows(PAGE, "chunk", "candidates")
    chunks = [range(*map(int, chunk.strip("[)").split(","))) for chunk, *_ in lines]
    return [
        (chunk, positions(candidates), selected, positions(attended))
        for chunk, (_, candidates, selected, attended) in zip(chunks, lines, strict=True)
    ]


def test_the_oracle_attends_to_what_the_example_says(keys, example):
    settings = Selection(
        METHOD.top_k,
        METHOD.n_init,
        METHOD.n_local,
        METHOD.query_chunk,
        METHOD.tail_queries,
        METHOD.similarity_threshold,
        METHOD.refresh_interval,
    )
    chunks = [chunk for chunk, *_ in example]
    assert query_chunks(0, len(keys), PROMPT, settings) == chunks
    last = None
    for chunk, candidates, selected, attended in example:
        queries = torch.ones(len(chunk), 1, 1)
        before = last if chunk.start > PROMPT else None  # no prompt leaves one to what is generated
        seen, last, _ = attended_positions(
            queries, keys[None, : chunk.stop, None], chunk, 1.0, settings, before
        )
        assert candidates == list(range(METHOD.n_init, chunk.start - METHOD.n_local))
        assert seen.tolist() == attended
        assert (last is None) == (selected == "dense")
        assert (before is not None and last is before) == selected.endswith("reused")
        if last is not None:
            chosen = sorted(last.chosen.tolist())
            assert selected.removesuffix(", reused") == " ".join(map(str, chosen))


def test_the_package_attends_to_what_the_example_says(keys, example):
    plan = SelectionPlan.build(
        np.array([0, len(keys)], np.int32),
        np.array([len(keys)], np.int32),
        BatchRequests.without_seats(np.array([PROMPT], np.int32), METHOD.top_k),
        METHOD,
    )
    # Dense chunks are joined.
    assert plan.chunk_end.tolist() == [chunk.stop for chunk, *_ in example][1:]
    row_seq, ends = torch.from_numpy(plan.row_seq), torch.from_numpy(plan.candidate_end)
    pages, table = torch.zeros(1, 1, 2, 16, 1), torch.zeros(1, 1, dtype=torch.int32)
    pages[0, 0, 0, : len(keys), 0] = keys
    votes = soft_vote(
        score_paged_keys(
            torch.ones(plan.num_rows, 1, 1), pages, table, row_seq, METHOD.n_init, ends, 1.0
        )
    )
    slots = torch.zeros(plan.num_rows, 16, dtype=torch.int32)
    lengths = torch.zeros(plan.num_rows, dtype=torch.int32)
    build_sparse_block_table(
        votes,
        table,
        row_seq,
        METHOD.n_init,
        torch.from_numpy(plan.top_k),
        ends,
        torch.from_numpy(plan.chunk_end),
        16,
        slots,
        lengths,
    )
    for row, (_, _, selected, attended) in enumerate(example[1:]):
        if not selected.endswith("reused"):  # nothing of these rows is cached
            assert slots[row, : lengths[row]].tolist() == attended
