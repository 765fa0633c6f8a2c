"""What cannot be served stops the server at start, and what can be uses all of the machine."""

import os

import pytest

pytestmark = pytest.mark.server


def test_unknown_settings_stop_the_server_and_the_allowed_ones_are_listed(refusal):
    log = refusal({"topk": 5, "n_local": -1})
    assert "topk: there is no such setting" in log
    assert "n_local = -1" in log
    assert "query_chunk: integer >= 1, default 512" in log


def test_a_step_too_small_for_a_chunk_stops_the_server_and_it_says_what_fits(refusal):
    log = refusal({}, "--max-num-batched-tokens", "520", "--max-num-seqs", "16")
    assert "Set --max-num-batched-tokens to at least 528" in log


def test_a_worker_that_is_bound_to_cores_still_uses_all_its_threads(sparse_client):
    threads = len(os.sched_getaffinity(0))
    log = sparse_client.server.log()
    assert f"the CPU kernels run on {threads} of PyTorch's {threads} threads" in log
