"""Slots on Model Runner V1 follow the requests, not the rows of its batch."""

from types import SimpleNamespace

import pytest

from vllm_tokenselect.hooks.runner_v1 import current_requests, requests_of_step, update_slots
from vllm_tokenselect.requests import RequestTable


def step(new=(), resumed=(), preempted=None, finished=()):
    """The part of vLLM's `SchedulerOutput` that the hook reads."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=request_id) for request_id in new],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
        preempted_req_ids=preempted,
        finished_req_ids=set(finished),
    )


@pytest.fixture
def runner():
    prompts = {"a": 100, "b": 200, "c": 300}
    return SimpleNamespace(
        requests={
            request_id: SimpleNamespace(num_prompt_tokens=length)
            for request_id, length in prompts.items()
        },
        input_batch=SimpleNamespace(req_ids=[]),
    )


@pytest.fixture
def table():
    return RequestTable(2)


@pytest.fixture
def resets(table):
    slots = []
    table.on_reset(slots.append)
    return slots


def test_a_finished_request_makes_room_for_one_that_is_new_in_the_same_step(table, runner):
    update_slots(table, runner, step(new=["a", "b"]))
    update_slots(table, runner, step(new=["c"], finished=["a"]))
    assert "a" not in table
    assert sorted(table.slots_of(["b", "c"])) == [0, 1]
    assert table.prompt_lens[table.slots_of(["c"])] == [300]


def test_a_preempted_request_makes_room_and_its_slot_is_reset_when_it_is_resumed(
    table, runner, resets
):
    update_slots(table, runner, step(new=["a", "b"]))
    update_slots(table, runner, step(new=["c"], preempted={"b"}))
    update_slots(table, runner, step(resumed=["b"], finished=["c"], preempted=set()))
    assert len(resets) == 4
    assert resets[-1] == table.slots_of(["b"])[0]


def test_a_request_that_is_preempted_and_resumed_in_one_step_is_reset(table, runner, resets):
    update_slots(table, runner, step(new=["a"]))
    update_slots(table, runner, step(resumed=["a"], preempted={"a"}))
    assert len(resets) == 2
    assert "a" in table


def test_a_request_id_that_is_used_again_is_another_request(table, runner, resets):
    update_slots(table, runner, step(new=["a"]))
    update_slots(table, runner, step(new=["a"], finished=["a"]))
    assert len(resets) == 2
    assert "a" in table


def test_the_builder_learns_the_slots_in_the_order_of_the_rows(table, runner):
    update_slots(table, runner, step(new=["a", "b"]))
    runner.input_batch.req_ids = ["b", "a", "stale"]
    with requests_of_step(table, runner, num_reqs=2, dummy=False):
        requests = current_requests()
        assert requests.table.ids_of(requests.slots) == ["b", "a"]
    assert current_requests() is None


def test_a_dummy_step_belongs_to_no_request(table, runner):
    runner.input_batch.req_ids = ["stale"]
    with requests_of_step(table, runner, num_reqs=1, dummy=True):
        assert current_requests() is None


def test_requests_do_not_outlive_a_step_that_failed(table, runner):
    with pytest.raises(ZeroDivisionError), requests_of_step(table, runner, 0, dummy=False):
        raise ZeroDivisionError
    assert current_requests() is None
