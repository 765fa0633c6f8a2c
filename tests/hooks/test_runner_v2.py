"""Seats on Model Runner V2 are the rows of its own request table."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu import model_runner, states

from vllm_tokenselect.engine.step_requests import request_table
from vllm_tokenselect.hooks import runner_v2
from vllm_tokenselect.method.settings import FULL_ATTENTION

SERVER_TOP_K = 1000
METHODS = ("add_requests", "_remove_request")


class HostTensor:
    """Stands in for vLLM's tensors in pinned memory, which need a GPU; keeps nothing."""

    def __init__(self, shape, dtype, **placement):
        self.np = torch.zeros(shape, dtype=dtype).numpy()

    def stage_write(self, *args):
        pass

    stage_write_elem = apply_write = copy_to_uva = stage_write


def new_request(request_id: str, prompt_len: int = 2, **extra_args):
    """The part of vLLM's `NewRequestData` that a runner reads."""
    return SimpleNamespace(
        req_id=request_id,
        prompt_len=prompt_len,
        prefill_token_ids=[1] * prompt_len,
        prompt_token_ids=[1] * prompt_len,
        num_computed_tokens=0,
        sampling_params=SamplingParams(max_tokens=4, extra_args=extra_args or None),
        mm_features=[],
        block_ids=([],),
        lora_request=None,
    )


class Runner:
    """vLLM's real bookkeeping of requests, of `rows` rows, without what computes."""

    def __init__(self, module, rows: int) -> None:
        self.vllm = runner = object.__new__(module.GPUModelRunner)
        runner.req_states = states.RequestState(
            max_num_reqs=rows,
            max_model_len=16,
            max_num_batched_tokens=16,
            num_speculative_steps=0,
            vocab_size=8,
            device=torch.device("cpu"),
        )
        runner.vllm_config = SimpleNamespace(
            additional_config={"tokenselect": {"top_k": SERVER_TOP_K}},
            attention_config=SimpleNamespace(backend="TOKENSELECT"),
        )
        for part in ("model_state", "block_tables", "lora_state"):
            setattr(runner, part, MagicMock())
        for part in (
            *("adaptive_verification", "pooling_runner", "encoder_cache"),
            *("prompt_logprobs_worker", "pp_handler", "sampler"),
        ):
            setattr(runner, part, None)
        runner.is_last_pp_rank = False

    def step(self, *new, finished=(), preempted=()) -> None:
        output = SimpleNamespace(
            scheduled_new_reqs=list(new),
            finished_req_ids=set(finished),
            preempted_req_ids=set(preempted),
        )
        self.vllm.finish_requests(output)
        self.vllm.add_requests(output)

    @property
    def table(self):
        return request_table(self.vllm.vllm_config)

    def row(self, request_id: str) -> int:
        return self.vllm.req_states.req_id_to_index[request_id]


@pytest.fixture(params=["hook", "diff"])
def new_runner(request, monkeypatch):
    """Make runners, once with the hook installed and once with our diff applied."""
    monkeypatch.setattr(states, "StagedWriteTensor", HostTensor)
    monkeypatch.setattr(states, "UvaBackedTensor", HostTensor)
    if request.param == "diff":
        import vllm_tokenselect.backend  # noqa: F401 - marks a process that runs our layers

        module = request.getfixturevalue("load_patched")("vllm/v1/worker/gpu/model_runner.py")
    else:
        module = model_runner
        for name in METHODS:
            monkeypatch.setattr(module.GPUModelRunner, name, getattr(module.GPUModelRunner, name))
        runner_v2.install()
        runner_v2.install()
    return lambda rows: Runner(module, rows)


@pytest.fixture
def runner(new_runner):
    return new_runner(3)


def test_a_request_has_the_seat_of_its_row_and_its_prompt_length(runner):
    assert runner.table is None
    runner.step(new_request("a", 5), new_request("b", 7))
    rows = [runner.row("a"), runner.row("b")]
    table = runner.table
    assert table.seats_of(["a", "b"]).tolist() == rows
    assert table.prompt_lens[rows].tolist() == [5, 7]


def test_each_request_selects_by_its_own_settings(runner):
    runner.step(
        new_request("a"),
        new_request("b", tokenselect="off"),
        new_request("c", tokenselect_top_k=7),
    )
    table = runner.table
    selected = table.top_k[table.seats_of(["a", "b", "c"])]
    assert selected.tolist() == [SERVER_TOP_K, FULL_ATTENTION, 7]


def test_a_request_that_samples_nothing_selects_as_the_server_does(runner):
    pooling = new_request("a")
    pooling.sampling_params = None
    runner.step(pooling)
    assert runner.table.top_k[runner.row("a")] == SERVER_TOP_K


def test_a_row_that_is_given_to_another_request_has_another_owner(runner):
    runner.step(new_request("a", tokenselect_top_k=7))
    row, table = runner.row("a"), runner.table
    owner = table.owners[row]
    runner.step(new_request("b"), finished=["a"])
    assert "a" not in table
    assert runner.row("b") == row
    assert table.owners[row] != owner
    assert table.top_k[row] == SERVER_TOP_K


def test_a_resumed_request_is_another_owner_with_the_same_settings(runner):
    runner.step(new_request("a", tokenselect_top_k=7))
    table = runner.table
    owner = table.owners[runner.row("a")]
    runner.step(new_request("b"), preempted=["a"])
    assert "a" not in table
    runner.step(new_request("a", tokenselect_top_k=7))
    row = runner.row("a")
    assert table.seats_of(["a"]) == [row]
    assert table.owners[row] != owner
    assert table.top_k[row] == 7


def test_streams_that_are_continued_have_their_new_prompts_and_settings(runner):
    runner.step(new_request("a", 5), new_request("b", 6))
    table = runner.table
    owners = table.owners.tolist()
    runner.step(new_request("c"), new_request("b", 9, tokenselect="off"), new_request("a", 8))
    rows = [runner.row(request_id) for request_id in "abc"]
    assert table.seats_of("abc").tolist() == rows
    assert table.prompt_lens[rows].tolist() == [8, 9, 2]
    assert table.top_k[rows].tolist() == [SERVER_TOP_K, FULL_ATTENTION, SERVER_TOP_K]
    assert not set(table.owners[rows].tolist()) & set(owners)


def test_rows_come_and_go_without_a_leak(runner):
    for round_ in range(10):
        names = [f"{round_}-{index}" for index in range(3)]
        runner.step(*map(new_request, names))
        assert sorted(runner.table.seats_of(names)) == [0, 1, 2]
        runner.step(finished=names[:2], preempted=names[2:])
    assert len(runner.table) == 0


def test_a_row_that_is_freed_without_a_step_can_be_used_again(runner):
    """As vLLM does with the requests that it makes up to warm up."""
    runner.step(new_request("warmup"))
    assert runner.vllm._remove_request("warmup")
    runner.step(new_request("a"))
    assert runner.table.seats_of(["a"]) == [runner.row("a")]


def test_removing_an_unknown_request_is_left_to_vllm(runner):
    assert runner.vllm._remove_request("never added") is False
    runner.step(finished=["never added"])


def test_runners_of_one_process_have_tables_of_their_own(new_runner):
    first, second = new_runner(3), new_runner(3)
    first.step(new_request("a", tokenselect_top_k=7))
    second.vllm.vllm_config.attention_config.backend = "CPU_ATTN"
    second.vllm.vllm_config.additional_config = {"tokenselect": {"no such": "setting"}}
    second.step(new_request("b", tokenselect="somebody else's"), finished=["a"])
    assert first.table.seats_of(["a"]) == [first.row("a")]
    assert first.table.top_k[first.row("a")] == 7
    assert "b" not in first.table


def test_settings_that_no_front_refused_end_no_worker(runner):
    runner.step(new_request("a", tokenselect_top_k=99999), new_request("b", tokenselect="of"))
    assert runner.table.top_k[[runner.row("a"), runner.row("b")]].tolist() == [SERVER_TOP_K] * 2
