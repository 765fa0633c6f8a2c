"""Slots on Model Runner V2 are the rows of its own request table."""

from functools import partial

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.worker.gpu import states

from vllm_tokenselect.hooks import runner_v2


class HostTensor:
    """Stands in for vLLM's tensors in pinned memory, which need a GPU; keeps nothing."""

    def __init__(self, shape, dtype, **placement):
        self.np = torch.zeros(shape, dtype=dtype).numpy()

    def stage_write(self, *args):
        pass

    def stage_write_elem(self, *args):
        pass


def request_state(module, rows: int):
    return module.RequestState(
        max_num_reqs=rows,
        max_model_len=16,
        max_num_batched_tokens=16,
        num_speculative_steps=0,
        vocab_size=8,
        device=torch.device("cpu"),
    )


def add(state, request_id: str, prompt_len: int = 2) -> int:
    state.add_request(
        request_id,
        prompt_len=prompt_len,
        all_token_ids=[1] * prompt_len,
        num_computed_tokens=0,
        max_tokens=4,
    )
    return state.req_id_to_index[request_id]


@pytest.fixture(params=["hook", "diff"])
def new_state(request, monkeypatch):
    """Make vLLM's real bookkeeping, once with the hook installed and once with our diff applied."""
    monkeypatch.setattr(runner_v2, "_table", None)
    if request.param == "diff":
        import vllm_tokenselect.backend  # noqa: F401 - marks a process that runs our layers

        module = request.getfixturevalue("load_patched")("vllm/v1/worker/gpu/states.py")
    else:
        module = states
        for name in ("add_request", "remove_request"):
            monkeypatch.setattr(states.RequestState, name, getattr(states.RequestState, name))
        runner_v2.install()
        runner_v2.install()
    monkeypatch.setattr(module, "StagedWriteTensor", HostTensor)
    monkeypatch.setattr(module, "UvaBackedTensor", HostTensor)
    yield partial(request_state, module)
    if module is states:
        del states.RequestState._tokenselect_add_request


@pytest.fixture
def state(new_state):
    return new_state(3)


def test_a_request_has_the_slot_of_its_row_and_its_prompt_length(state):
    assert runner_v2.request_table() is None
    rows = [add(state, request_id, length) for request_id, length in (("a", 5), ("b", 7))]
    table = runner_v2.request_table()
    assert table.slots_of(["a", "b"]).tolist() == rows
    assert table.prompt_lens[rows].tolist() == [5, 7]


def test_a_row_that_is_given_to_another_request_is_reset(state):
    row = add(state, "a")
    resets = []
    runner_v2.request_table().on_reset(resets.append)
    assert state.remove_request("a") == row
    assert "a" not in runner_v2.request_table()
    assert add(state, "b") == row
    assert resets == [row]


def test_rows_come_and_go_without_a_leak(state):
    for round_ in range(10):
        names = [f"{round_}-{index}" for index in range(3)]
        for name in names:
            add(state, name)
        assert sorted(runner_v2.request_table().slots_of(names)) == [0, 1, 2]
        for name in names:
            state.remove_request(name)
    assert len(runner_v2.request_table()) == 0


def test_removing_an_unknown_request_is_left_to_vllm(state):
    assert state.remove_request("never added") is None


def test_a_runner_of_another_size_starts_a_table_of_its_own(new_state):
    add(new_state(3), "a")
    add(new_state(5), "b")
    table = runner_v2.request_table()
    assert table.capacity == 5
    assert "a" not in table
