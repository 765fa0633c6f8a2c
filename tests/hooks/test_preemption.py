"""When blocks run short, the request with the fewest computed tokens is preempted.

Each step of `Serving` checks, besides: what was thrown away is never more than what was kept, no
shortage comes unexpected, and the requests that stay keep their order.
"""

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from tests.hooks.conftest import BLOCK_SIZE, MAX_NUM_SEQS, QUERY_CHUNK
from tests.hooks.serving import Serving
from vllm_tokenselect.hooks.preemption import blocks_may_run_short
from vllm_tokenselect.hooks.scheduler import TokenSelectAsyncScheduler, TokenSelectScheduler

MIN_BUDGET = QUERY_CHUNK + MAX_NUM_SEQS


@pytest.fixture(autouse=True)
def seams_are_checked_elsewhere(monkeypatch):
    """Reading vLLM's source for each scheduler would take most of the time of these tests."""
    monkeypatch.setattr("vllm_tokenselect.hooks.scheduler.SEAMS", ())


@pytest.fixture
def crowded(make_vllm_config):
    """A short request, then a long one; both grow until the blocks do not suffice."""

    def make(scheduler_cls=TokenSelectScheduler, policy=SchedulingPolicy.FCFS):
        serving = Serving(make_vllm_config(4 * QUERY_CHUNK), scheduler_cls)
        serving.scheduler.policy = policy
        short = serving.add([1] * 100, max_tokens=120)
        long = serving.add([2] * 400, max_tokens=120)
        return serving, short, long

    return make


@pytest.mark.parametrize("scheduler_cls", [TokenSelectScheduler, TokenSelectAsyncScheduler])
def test_the_long_request_stays_although_the_short_one_came_first(crowded, scheduler_cls):
    serving, short, long = crowded(scheduler_cls)
    serving.run()
    assert short.num_preemptions > 0
    assert long.num_preemptions == 0


def test_with_the_priority_policy_the_choice_is_vllms(crowded):
    serving, short, long = crowded(policy=SchedulingPolicy.PRIORITY)
    serving.run()
    assert short.num_preemptions == 0
    assert long.num_preemptions > 0, "of equal priority, the later one"


def served_in_order(serving) -> list[str]:
    return [request.request_id for request, *_ in serving.step()]


@pytest.fixture
def short_and_long(make_vllm_config):
    """A short request and then a long one, both generating; `free` blocks are left."""

    def make(free: int):
        serving = Serving(make_vllm_config(4 * QUERY_CHUNK), num_blocks=14 + free)
        serving.add([1] * 40, max_tokens=100)
        serving.add([2] * 152, max_tokens=100)
        serving.step()
        assert serving.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
        return serving

    return make


@pytest.mark.parametrize("free", [30, 1], ids=["plenty", "just-enough"])
def test_without_a_shortage_the_first_to_come_is_served_first(short_and_long, free):
    """With one free block, both still have room in their last one."""
    serving = short_and_long(free)
    assert served_in_order(serving) == ["0", "1"]


def test_in_a_shortage_the_longest_is_served_first_and_only_then(short_and_long):
    serving = short_and_long(free=1)
    orders = [served_in_order(serving) for _ in range(40)]
    assert ["0", "1"] in orders
    assert ["1"] in orders, "the short one is preempted"
    assert orders[0] == ["0", "1"], "and until then it came first"


def test_a_long_prefill_takes_the_budget_only_while_blocks_are_short(make_vllm_config):
    """Its place among the running requests is behind those that generate."""
    serving = Serving(make_vllm_config(MIN_BUDGET), num_blocks=80)
    serving.add([1] * 60, max_tokens=100)
    serving.step()
    serving.add([2] * 800, max_tokens=1)
    for _ in range(10):
        assert served_in_order(serving) == ["0", "1"]


@pytest.mark.parametrize("drafts", [0, 3])
@settings(
    max_examples=75,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=st.data(),
    scheduler_cls=st.sampled_from([TokenSelectScheduler, TokenSelectAsyncScheduler]),
    budget=st.integers(MIN_BUDGET + 4 * 3, 4 * QUERY_CHUNK),
    arrivals=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 450), st.integers(1, 150)),
        min_size=2,
        max_size=8,
    ),
)
def test_every_load_ends(make_vllm_config, drafts, data, scheduler_cls, budget, arrivals):
    """Also with drafts that are accepted or rejected by chance, and slots kept ahead for them."""
    serving = Serving(make_vllm_config(budget), scheduler_cls)
    serving.scheduler.num_lookahead_tokens = drafts
    generator = data.draw(st.randoms(use_true_random=False))
    alone = 0
    for wait, length, max_tokens in arrivals:
        for _ in range(wait):
            serving.step(drafts, generator)
        serving.add([len(serving.requests) + 1] * length, max_tokens)
        alone += -(-length // QUERY_CHUNK) + max_tokens
    # The request with the most computed tokens advances in every step, and keeps what it has.
    for _ in range(2 * alone + len(arrivals)):
        if all(request.is_finished() for request in serving.requests.values()):
            return
        assert serving.step(drafts, generator), "nothing was computed although requests wait"
    raise AssertionError("the requests take longer together than one after the other")


@pytest.mark.parametrize("lookahead", [0, 1, BLOCK_SIZE])
def test_slots_kept_ahead_of_drafts_count(short_and_long, lookahead):
    serving = short_and_long(free=1)
    serving.scheduler.num_lookahead_tokens = lookahead
    assert blocks_may_run_short(serving.scheduler) == (lookahead == BLOCK_SIZE)


def test_slots_kept_ahead_count_for_every_request(short_and_long):
    serving = short_and_long(free=20)
    assert not blocks_may_run_short(serving.scheduler)
    serving.scheduler.num_lookahead_tokens = 20 * BLOCK_SIZE
    assert blocks_may_run_short(serving.scheduler)


def test_drafts_count(short_and_long):
    serving = short_and_long(free=1)
    for request in serving.scheduler.running:
        request.spec_token_ids = [7] * BLOCK_SIZE
    assert blocks_may_run_short(serving.scheduler)


def test_tokens_that_are_still_being_sampled_count(make_vllm_config):
    serving = Serving(make_vllm_config(4 * QUERY_CHUNK), TokenSelectAsyncScheduler, num_blocks=11)
    serving.add([1] * 160)
    serving.scheduler.schedule()
    assert blocks_may_run_short(serving.scheduler), "the next token starts an eleventh block"


def test_what_a_request_may_never_reach_does_not_count(make_vllm_config):
    serving = Serving(make_vllm_config(4 * QUERY_CHUNK), num_blocks=12)
    serving.add([1] * 152, max_tokens=100)
    serving.step()
    serving.scheduler.num_lookahead_tokens = 10 * BLOCK_SIZE
    assert blocks_may_run_short(serving.scheduler)
    serving.scheduler.max_model_len = 160
    assert not blocks_may_run_short(serving.scheduler)
