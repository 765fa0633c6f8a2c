"""Seats on Model Runner V1 follow the requests, not the rows of its batch."""

from types import SimpleNamespace

import pytest

from vllm_tokenselect.engine.step_requests import current_requests
from vllm_tokenselect.hooks.runner_v1 import requests_of_step, update_seats
from vllm_tokenselect.method.requests import RequestTable
from vllm_tokenselect.method.settings import FULL_ATTENTION


def step(new=(), resumed=(), preempted=None, finished=()):
    """The part of vLLM's `SchedulerOutput` that the hook reads."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=request_id) for request_id in new],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
        preempted_req_ids=preempted,
        finished_req_ids=set(finished),
    )


def state(num_prompt_tokens: int, **extra_args):
    """The part of vLLM's `CachedRequestState` that the hook reads."""
    return SimpleNamespace(
        num_prompt_tokens=num_prompt_tokens,
        sampling_params=SimpleNamespace(extra_args=extra_args or None),
    )


@pytest.fixture
def runner():
    return SimpleNamespace(
        requests={"a": state(100), "b": state(200), "c": state(300)},
        input_batch=SimpleNamespace(req_ids=[]),
        vllm_config=SimpleNamespace(
            additional_config={"tokenselect": {"top_k": 1000}},
            attention_config=SimpleNamespace(backend="TOKENSELECT"),
        ),
    )


@pytest.fixture
def table():
    return RequestTable(2)


def owner(table, request_id: str) -> int:
    """A number that no owner of any seat had before."""
    return table.owners[table.seats_of([request_id])[0]]


def test_a_finished_request_makes_room_for_one_that_is_new_in_the_same_step(table, runner):
    update_seats(table, runner, step(new=["a", "b"]))
    update_seats(table, runner, step(new=["c"], finished=["a"]))
    assert "a" not in table
    assert sorted(table.seats_of(["b", "c"])) == [0, 1]
    assert table.prompt_lens[table.seats_of(["c"])] == [300]


def test_a_preempted_request_makes_room_and_is_another_owner_when_it_is_resumed(table, runner):
    update_seats(table, runner, step(new=["a", "b"]))
    owners = {owner(table, "a"), owner(table, "b")}
    update_seats(table, runner, step(new=["c"], preempted={"b"}))
    owners.add(owner(table, "c"))
    update_seats(table, runner, step(resumed=["b"], finished=["c"], preempted=set()))
    assert owner(table, "b") not in owners
    assert len(owners) == 3


def test_a_request_that_is_preempted_and_resumed_in_one_step_is_another_owner(table, runner):
    update_seats(table, runner, step(new=["a"]))
    before = owner(table, "a")
    update_seats(table, runner, step(resumed=["a"], preempted={"a"}))
    assert owner(table, "a") != before


def test_a_request_id_that_is_used_again_is_another_request(table, runner):
    update_seats(table, runner, step(new=["a"]))
    before = owner(table, "a")
    update_seats(table, runner, step(new=["a"], finished=["a"]))
    assert owner(table, "a") != before


def test_each_request_selects_by_its_own_settings(table, runner):
    runner.requests["a"] = state(100, tokenselect="off")
    update_seats(table, runner, step(new=["a", "b"]))
    assert table.top_k[table.seats_of(["a", "b"])].tolist() == [FULL_ATTENTION, 1000]
    runner.requests["c"] = state(300, tokenselect_top_k=7)
    update_seats(table, runner, step(new=["c"], finished=["a"]))
    assert table.top_k[table.seats_of(["c"])] == [7]


def test_a_resumed_request_keeps_its_settings(table, runner):
    runner.requests["a"] = state(100, tokenselect_top_k=7)
    update_seats(table, runner, step(new=["a"]))
    update_seats(table, runner, step(new=["b", "c"], preempted={"a"}))
    update_seats(table, runner, step(resumed=["a"], finished=["b"], preempted=set()))
    assert table.top_k[table.seats_of(["a"])] == [7]


def test_a_stream_that_is_continued_has_its_new_prompt_and_settings(table, runner):
    update_seats(table, runner, step(new=["a"]))
    before = owner(table, "a")
    runner.requests["a"] = state(150, tokenselect_top_k=7)
    update_seats(table, runner, step(new=["a"]))
    seat = table.seats_of(["a"])[0]
    assert (table.prompt_lens[seat], table.top_k[seat]) == (150, 7)
    assert owner(table, "a") != before


def test_a_request_that_samples_nothing_selects_as_the_server_does(table, runner):
    runner.requests["a"].sampling_params = None
    update_seats(table, runner, step(new=["a"]))
    assert table.top_k[table.seats_of(["a"])] == [1000]


def test_the_builder_learns_the_seats_in_the_order_of_the_rows(table, runner):
    update_seats(table, runner, step(new=["a", "b"]))
    runner.input_batch.req_ids = ["b", "a", "stale"]
    with requests_of_step(table, runner, num_reqs=2, dummy=False):
        requests = current_requests()
        assert requests.seats.tolist() == table.seats_of(["b", "a"]).tolist()
    assert current_requests() is None


def test_a_dummy_step_belongs_to_no_request(table, runner):
    runner.input_batch.req_ids = ["stale"]
    with requests_of_step(table, runner, num_reqs=1, dummy=True):
        assert current_requests() is None


def test_requests_do_not_outlive_a_step_that_failed(table, runner):
    with pytest.raises(ZeroDivisionError), requests_of_step(table, runner, 0, dummy=False):
        raise ZeroDivisionError
    assert current_requests() is None


def test_settings_that_no_front_refused_end_no_worker(table, runner):
    runner.requests["a"] = state(150, tokenselect_top_k=99999)
    update_seats(table, runner, step(new=["a"]))
    assert table.top_k[table.seats_of(["a"])] == [1000]


def test_another_engine_of_the_process_keeps_its_arguments_to_itself(table, runner):
    runner.vllm_config.attention_config.backend = "CPU_ATTN"
    runner.vllm_config.additional_config = {"tokenselect": {"no such": "setting"}}
    runner.requests["a"] = state(150, tokenselect="theirs")
    update_seats(table, runner, step(new=["a"]))
    assert "a" in table
