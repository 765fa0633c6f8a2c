"""Under vLLM's real scheduler, what is computed together depends on the request alone.

With query chunks of C tokens, a request whose prompt's tail starts at s has the limit L: s rounded
down to a multiple of C. A prefill step ends at a multiple of C, at s, or past it; only blocks below
L enter the prefix cache, and a hit ends at a multiple of C, at most at the reader's L.
"""

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.config import ParallelConfig, SpeculativeConfig

from tests.hooks.conftest import MAX_NUM_SEQS, QUERY_CHUNK
from tests.hooks.serving import CONFIG, Serving
from vllm_tokenselect.hooks.scheduler import TokenSelectAsyncScheduler, TokenSelectScheduler

MIN_BUDGET = QUERY_CHUNK + MAX_NUM_SEQS


@pytest.fixture(autouse=True)
def seams_are_checked_elsewhere(monkeypatch):
    """Reading vLLM's source for each scheduler would take most of the time of these tests."""
    monkeypatch.setattr("vllm_tokenselect.hooks.scheduler.SEAMS", ())


def check_steps(steps) -> None:
    for request, start, end, starts_here in steps:
        tail_start = CONFIG.method.tail_start(request.num_prompt_tokens)
        assert end % QUERY_CHUNK == 0 or end >= tail_start, (
            f"a step [{start}, {end}) splits a chunk of a prompt whose tail starts at {tail_start}"
        )
        if starts_here:
            assert start % QUERY_CHUNK == 0
            assert start <= CONFIG.method.shareable_tokens(request.num_prompt_tokens)


@st.composite
def prompts(draw) -> list[int]:
    """Prompts that share beginnings of any length with each other."""
    shared = draw(st.integers(0, 400))
    own = draw(st.lists(st.integers(1, 100), min_size=1, max_size=60))
    return [draw(st.integers(101, 102))] * shared + own


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    budget=st.integers(MIN_BUDGET, 4 * QUERY_CHUNK),
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), prompts(), st.integers(1, 40)), min_size=1, max_size=8
    ),
)
@example(budget=MIN_BUDGET, arrivals=[(0, [101] * 400 + [index], 40) for index in range(8)])
@example(budget=200, arrivals=[(index, [index + 1] * 450, 100) for index in range(6)])
def test_chunks_are_whole_and_only_whole_chunks_are_shared(make_vllm_config, budget, arrivals):
    serving = Serving(make_vllm_config(max_num_batched_tokens=budget))
    for wait, prompt, max_tokens in arrivals:
        for _ in range(wait):
            check_steps(serving.step())
        serving.add(prompt, max_tokens)
    check_steps(serving.run())


@pytest.mark.parametrize("scheduler_cls", [TokenSelectScheduler, TokenSelectAsyncScheduler])
@pytest.mark.parametrize(
    ("length", "hit"),
    [(300, 256), (266, 256), (265, 192), (74, 64), (73, 0), (64, 0), (10, 0), (1, 0)],
)
def test_a_prompt_sent_twice_hits_up_to_its_limit(make_vllm_config, scheduler_cls, length, hit):
    serving = Serving(make_vllm_config(), scheduler_cls)
    for expected in (0, hit):
        request = serving.add([5] * length)
        steps = serving.run()
        assert [start for _, start, _, starts_here in steps if starts_here] == [expected]
        assert [end for _, start, end, _ in steps if start < length][-1] == length
        assert request.num_output_tokens == 3
        check_steps(steps)
        serving.requests.clear()


@pytest.mark.parametrize(
    ("shared", "hit"), [(300, 256), (256, 256), (255, 192), (191, 128), (63, 0)]
)
def test_a_hit_is_cut_to_whole_chunks_of_what_is_shared(make_vllm_config, shared, hit):
    serving = Serving(make_vllm_config())
    serving.add([5] * 400)
    serving.run()
    reader = serving.add([5] * shared + [6] * 100)
    _, start, *_ = next(step for step in serving.run() if step[0] is reader)
    assert start == hit


def eagle(config):
    """An engine's configuration with drafts that read the model's hidden states."""
    config.speculative_config = SpeculativeConfig(
        method="eagle",
        model=config.model_config.model,
        num_speculative_tokens=2,
        target_model_config=config.model_config,
        target_parallel_config=ParallelConfig(),
    )
    return config


@pytest.mark.parametrize(("cached", "hit"), [(330, 256), (266, 256), (265, 192)])
def test_where_drafts_read_hidden_states_a_hit_ends_where_vllm_lets_it(
    make_vllm_config, cached, hit
):
    """vLLM 0.32 drops the last block of a hit with EAGLE and MTP, and with it the last chunk.

    A reader of 300 tokens may take 256, and no block behind them.
    """
    serving = Serving(eagle(make_vllm_config(max_num_batched_tokens=128)))
    dropped = 0 if serving.lookahead else QUERY_CHUNK
    serving.add([1] * cached)
    serving.run()
    serving.add([1] * 300)
    assert [start for _, start, _, _ in serving.step()] == [hit - dropped]


def test_a_shorter_reader_is_cut_at_its_own_limit(make_vllm_config):
    serving = Serving(make_vllm_config())
    serving.add([5] * 400)
    serving.run()
    reader = serving.add([5] * 200)
    _, start, *_ = next(step for step in serving.run() if step[0] is reader)
    assert start == 128  # the tail starts at 190


def test_a_step_may_end_where_the_tail_starts(make_vllm_config):
    serving = Serving(make_vllm_config(max_num_batched_tokens=100))
    serving.add([5] * 110)
    assert [(start, end) for _, start, end, _ in serving.run()][:2] == [(0, 100), (100, 110)]


def test_preempted_requests_come_back_and_end(make_vllm_config):
    serving = Serving(make_vllm_config(max_num_batched_tokens=4 * QUERY_CHUNK))
    for token in range(1, 4):
        serving.add([token] * 200, max_tokens=30)
    check_steps(serving.run())
    preemptions = sum(request.num_preemptions for request in serving.requests.values())
    assert preemptions > 0, "the test no longer forces a preemption"


def test_a_long_prompt_is_not_starved_by_running_requests(make_vllm_config):
    serving = Serving(make_vllm_config())
    for token in range(1, MAX_NUM_SEQS):
        serving.add([token] * 20, max_tokens=100)
    serving.step()
    long_prompt = serving.add([99] * 330, max_tokens=1)
    for _ in range(6):
        assert not long_prompt.is_finished()
        check_steps(serving.step())
    assert long_prompt.is_finished(), "one chunk a step beside the running requests"
