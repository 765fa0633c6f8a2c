"""`docs/method.md` says what the code does: the defaults, and the worked example."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from tests.docs.pages import rows
from tests.oracle.model import OracleModel, Selection, attended_positions, query_chunks
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.kernels.block_table.reference import build_sparse_block_table, order_keys
from vllm_tokenselect.kernels.score.reference import score_paged_keys
from vllm_tokenselect.kernels.vote.reference import soft_vote
from vllm_tokenselect.method.anchors import choose_anchors, give_roles
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
    assert written == {f.name: str(getattr(TokenSelectConfig(), f.name)) for f in fields(Method)}


@pytest.mark.parametrize(("block_size", "chunk"), [(128, 512), (80, 480), (528, 264), (16, 512)])
def test_query_chunks_line_up_with_blocks(block_size, chunk):
    assert Method().for_blocks(block_size).query_chunk == chunk


def test_votes_are_compared_in_16_bits():
    half, alike, higher = order_keys(torch.tensor([0.5, 0.503, 0.504])).tolist()
    assert half == alike < higher


@pytest.fixture
def keys() -> torch.Tensor:
    """Of the example, fp32 [positions]."""
    return keys_by("position")


def keys_by(heading: str) -> torch.Tensor:
    [[name, *numbers]] = rows(PAGE, heading, "0")
    assert name == "key"
    return torch.tensor([float(number) for number in numbers])


def positions(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


def chunk_of(text: str) -> range:
    return range(*map(int, text.strip("[)").split(",")))


@pytest.fixture
def example() -> list[tuple[range, list[int], str, list[int]]]:
    """Chunk, candidates, selected, attended."""
    lines = rows(PAGE, "chunk", "candidates")
    return [
        (chunk_of(chunk), positions(candidates), selected, positions(attended))
        for chunk, candidates, selected, attended in lines
    ]


def oracle_settings(method: Method) -> Selection:
    return Selection(**{f.name: getattr(method, f.name) for f in fields(Selection)})


def test_the_oracle_attends_to_what_the_example_says(keys, example):
    settings = oracle_settings(METHOD)
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
    plan, seen = attend_by_the_package(keys, METHOD)
    # Dense chunks are joined.
    assert plan.chunk_end.tolist() == [chunk.stop for chunk, *_ in example][1:]
    for row, (_, _, selected, attended) in enumerate(example[1:]):
        if not selected.endswith("reused"):  # what is selected is not kept here
            assert seen[row] == attended


def attend_by_the_package(keys: torch.Tensor, method: Method) -> tuple[SelectionPlan, list]:
    """The plan of the example, and what each of its rows attends to if it selects for itself."""
    end = np.array([len(keys)], np.int32)
    requests = BatchRequests.without_seats(np.array([PROMPT], np.int32), method.top_k)
    requests = replace(requests, seats=np.zeros(1, np.int32), owners=np.ones(1, np.int32))
    plan = SelectionPlan.build(np.array([0, len(keys)], np.int32), end, requests, method)
    row_seq, ends = torch.from_numpy(plan.row_seq), torch.from_numpy(plan.candidate_end)
    pages, table = torch.zeros(1, 1, 2, 16, 1), torch.zeros(1, 1, dtype=torch.int32)
    pages[0, 0, 0, : len(keys), 0] = keys
    votes = soft_vote(
        score_paged_keys(
            torch.ones(plan.num_rows, 1, 1), pages, table, row_seq, method.n_init, ends, 1.0
        )
    )
    slots = torch.zeros(plan.num_rows, 16, dtype=torch.int32)
    lengths = torch.zeros(plan.num_rows, dtype=torch.int32)
    build_sparse_block_table(
        votes,
        table,
        row_seq,
        method.n_init,
        torch.from_numpy(plan.top_k),
        ends,
        torch.from_numpy(plan.chunk_end),
        16,
        slots,
        lengths,
    )
    seen = [
        list(range(plan.chunk_end[row])) if plan.dense[row] else slots[row, : lengths[row]].tolist()
        for row in range(plan.num_rows)
    ]
    return plan, seen


SHARING = replace(METHOD, anchor_layers=(0,), min_context=13)


@pytest.fixture
def keys_of_layers(keys) -> list[torch.Tensor]:
    return [keys, keys_by("layer 1, position")]


@pytest.fixture
def shared() -> list[tuple[range, list[list[int]]]]:
    """Chunks of the example with two layers, and what is attended to in each."""
    lines = rows(PAGE, "chunk", "attended in layer 0, an anchor")
    return [(chunk_of(chunk), [*map(positions, attended)]) for chunk, *attended in lines]


def test_the_oracle_shares_what_the_example_says(keys_of_layers, shared):
    model = object.__new__(OracleModel)
    model.settings, model.prompt_len = oracle_settings(SHARING), PROMPT
    model.last, model.anchored, model.num_reused, model.margin = [None, None], {}, 0, 1.0
    for chunk, attended in shared:
        found = [
            model.attend_to(
                layer, torch.ones(len(chunk), 1, 1), keys[None, : chunk.stop, None], chunk, 1.0
            )
            for layer, keys in enumerate(keys_of_layers)
        ]
        assert [seen.tolist() for seen in found] == attended
    assert model.num_reused == 1


def test_the_package_shares_what_the_example_says(keys_of_layers, shared):
    layers = [attend_by_the_package(keys, SHARING) for keys in keys_of_layers]
    roles = give_roles(choose_anchors(SHARING.anchor_layers, range(2)), range(2))
    (plan, _), *_ = layers
    for chunk, attended in shared:
        row = plan.chunk_end.tolist().index(chunk.stop)
        if chunk.start > PROMPT + 1:
            continue  # what is selected is not kept here
        # A row that follows takes what the anchor below has.
        sources = [0 if role.follows and plan.follows[row] else i for i, role in enumerate(roles)]
        assert [layers[source][1][row] for source in sources] == attended
        assert plan.follows[row] == (chunk.stop > SHARING.min_context)
