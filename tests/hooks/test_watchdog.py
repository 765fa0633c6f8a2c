"""A request that no step ever has room for ends with an error, and those behind it are served."""

import pytest

pytest.importorskip("vllm")

from tests.hooks.workload import Arrival, Engine, Workload, start_engine
from vllm_tokenselect.hooks import watchdog

STUCK = 1000  # tokens of a prompt


@pytest.fixture
def workload(make_vllm_config, monkeypatch) -> Workload:
    """An engine that never finds a place to end the first chunk of prompts of one length."""
    monkeypatch.setattr(watchdog, "MOST_SECONDS", 0.0)
    running = start_engine(Engine(budget=200, max_num_seqs=4), make_vllm_config())
    chunks = running.scheduler.chunks
    whole = type(chunks).whole_chunks

    def whole_chunks(self, num_prompt_tokens: int, start: int, num_tokens: int) -> int:
        return (
            0 if num_prompt_tokens == STUCK else whole(self, num_prompt_tokens, start, num_tokens)
        )

    monkeypatch.setattr(type(chunks), "whole_chunks", whole_chunks)
    return running


def test_it_ends_with_an_error_that_names_it_and_the_others_go_on(workload, caplog):
    arrivals = [
        Arrival(0, [(1, 300)]),
        Arrival(0, [(2, STUCK)]),
        Arrival(0, [(3, 300)], max_tokens=5),
    ]
    workload.run(arrivals, 60 + watchdog.MOST_ATTEMPTS)
    reasons = {id_: end.finish_reason.name for id_, end in workload.ends.items()}
    assert reasons == {"0": "LENGTH", "1": "ERROR", "2": "LENGTH"}
    said = workload.ends["1"].stop_reason
    assert said.startswith("Request 1 ends with an error: in 101 attempts no step had room")
    assert "0 of 1000 tokens are computed, waiting" in said
    assert said in caplog.text


def test_a_request_that_waits_for_something_is_left_alone(workload):
    """A stream that waits for its client's next input has no token to be given."""
    workload.go_on_with_streams = lambda: None
    workload.add(Arrival(0, [(1, 300)], continuations=1))
    for _ in range(60 + watchdog.MOST_ATTEMPTS):
        workload.step()
    assert workload.unfinished()
    assert [end.finish_reason.name for end in workload.ends.values()] == ["LENGTH"], (
        "of a first part"
    )
