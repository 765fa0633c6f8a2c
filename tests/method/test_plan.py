"""The rows of a step are the chunks of the definition, however the scheduler cuts the steps."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method

CONFIG = Method(top_k=32, n_init=8, n_local=16, query_chunk=16, tail_queries=4)


def build(*requests: tuple[int, int, int], config=CONFIG) -> SelectionPlan:
    """Plan a step of requests given as (first position, end, prompt length)."""
    lens = [end - first for first, end, _ in requests]
    return SelectionPlan.build(
        np.cumsum([0, *lens]).astype(np.int32),
        np.array([end for _, end, _ in requests], np.int32),
        BatchRequests.without_seats(
            np.array([prompt for _, _, prompt in requests], np.int32), config.top_k
        ),
        config,
    ).by_kind()


def selecting_chunks(plan: SelectionPlan) -> list[tuple[int, int, int]]:
    rows = range(plan.dense.sum(), plan.num_rows)
    return [(int(plan.row_seq[r]), int(plan.chunk_start[r]), int(plan.chunk_end[r])) for r in rows]


def chunks_of(first: int, end: int, prompt: int, config=CONFIG) -> list[tuple[int, int]]:
    """The definition, position by position."""
    tail = config.tail_start(prompt)
    starts = [p for p in range(first, end) if p >= tail or p % config.query_chunk == 0]
    return list(zip(starts, [*starts[1:], end], strict=True))


def is_dense(start: int, config=CONFIG) -> bool:
    return start - config.n_local - config.n_init <= config.top_k


def test_a_prompt_is_cut_at_multiples_of_the_chunk_and_its_tail_into_single_queries():
    plan = build((64, 103, 100))
    assert selecting_chunks(plan) == [
        *[(0, p, p + 1) for p in range(96, 103)],
        (0, 64, 80),
        (0, 80, 96),
    ]


def test_the_last_chunk_before_the_tail_ends_where_the_tail_begins():
    plan = build((64, 80, 81))
    assert selecting_chunks(plan) == [(0, 77, 78), (0, 78, 79), (0, 79, 80), (0, 64, 77)]


def test_generated_tokens_select_for_themselves_also_when_recomputed_after_preemption():
    plan = build((96, 130, 100))
    assert selecting_chunks(plan) == [(0, p, p + 1) for p in range(96, 130)]


def build_request(first: int, end: int, prompt: int, config: Method) -> SelectionPlan:
    """Plan a step of one request that has a seat."""
    requests = BatchRequests(*(np.array([n], np.int32) for n in (0, 1, prompt, config.top_k)))
    starts, ends = np.array([0, end - first], np.int32), np.array([end], np.int32)
    return SelectionPlan.build(starts, ends, requests, config)


def test_generated_tokens_alone_may_follow_another_layers_selection():
    """Computed again after a preemption, together with the prompt's tail."""
    plan = build_request(64, 110, 100, CONFIG)
    assert plan.chunk_start[plan.follows].tolist() == [*range(100, 110)]
    # They stand together, behind those that see everything and before those that select in every layer.
    assert plan.by_kind().follows.tolist() == [True] * 10 + [False] * (plan.num_rows - 10)


@pytest.mark.parametrize("first", [64, 104])
def test_a_generated_token_attends_to_everything_up_to_min_context(first):
    plan = build_request(first, 110, 100, replace(CONFIG, min_context=106))
    dense = [*zip(plan.chunk_start[plan.dense], plan.chunk_end[plan.dense], strict=True)]
    assert dense == [(p, p + 1) for p in range(max(first, 100), 106)]
    assert (plan.lengths(CONFIG)[plan.dense] == plan.chunk_end[plan.dense]).all()
    assert not (plan.caches | plan.follows)[plan.dense].any()


def test_rows_that_follow_are_counted_as_shared():
    """Without a Selection Cache; with one, the anchor counts."""
    config = replace(CONFIG, similarity_threshold=1)
    plan = build_request(96, 110, 100, config)
    anchor, follower = plan.fixed_counts(config), plan.fixed_counts(config, follows=True)
    assert anchor.tolist()[: Counter.ATTENDED] == [14, 0, 0, 0]
    assert follower.tolist()[: Counter.ATTENDED] == [4, 0, 10, 0]
    assert (anchor[Counter.ATTENDED :] == follower[Counter.ATTENDED :]).all()
    assert build_request(100, 110, 100, CONFIG).fixed_counts(CONFIG, follows=True).sum() == 0


def test_a_chunk_is_dense_while_its_candidates_fit_the_budget():
    # Candidates of the chunk at 56 are [8, 40): exactly top_k; of the one at 57 one more.
    assert build((56, 57, 50)).dense.sum() == 1
    assert build((57, 58, 50)).dense.sum() == 0


def test_dense_chunks_of_a_request_become_one_row():
    plan = build((0, 100, 100))
    assert plan.dense.sum() == 1
    assert (plan.chunk_start[0], plan.chunk_end[0], plan.query_len[0]) == (0, 64, 64)


@st.composite
def batches(draw):
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.integers(1, 200))
        first = draw(st.integers(0, 12)) * CONFIG.query_chunk
        if first >= CONFIG.tail_start(prompt):
            first = draw(st.integers(CONFIG.tail_start(prompt), prompt + 20))
        requests.append((first, first + draw(st.integers(1, 60)), prompt))
    return requests


@given(batches())
@settings(max_examples=300, deadline=None)
def test_rows_are_the_chunks_of_the_definition_and_cover_every_query_once(requests):
    plan = build(*requests)
    expected = [
        (seq, *chunk)
        for seq, request in enumerate(requests)
        for chunk in chunks_of(*request)
        if not is_dense(chunk[0])
    ]
    assert sorted(selecting_chunks(plan)) == sorted(expected)
    queries = np.concatenate(
        [np.arange(s, s + n) for s, n in zip(plan.query_start, plan.query_len, strict=True)]
    )
    assert sorted(queries) == list(range(sum(end - first for first, end, _ in requests)))
    assert (plan.chunk_end <= CONFIG.max_attended)[: plan.dense.sum()].all()


@given(batches())
@settings(max_examples=100, deadline=None)
def test_attended_and_context_counts_are_those_of_counting_keys_one_by_one(requests):
    plan = build(*requests)
    attended = context = 0
    for request in requests:
        for start, end in chunks_of(*request):
            for position in range(start, end):
                visible = set(range(position + 1))
                context += len(visible)
                if not is_dense(start):
                    local = {p for p in visible if p >= start - CONFIG.n_local}
                    visible = local | set(range(CONFIG.n_init + CONFIG.top_k))
                attended += len(visible)
    assert plan.num_attended(CONFIG).sum() == attended
    assert plan.num_in_context().sum() == context
