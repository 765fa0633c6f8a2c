"""What cannot be served stops the server at start, and what can be uses all of the machine."""

import os
import re

import pytest

from vllm_tokenselect import __version__

pytestmark = pytest.mark.server


def start_logs(log: str) -> list[str]:
    """Each block that says what is served, without what vLLM puts before its lines."""
    lines = [re.sub(r"^.*?\[\w+\.py:\d+\] ", "", line) for line in log.splitlines()]
    starts = [n for n, line in enumerate(lines) if line.startswith(f"TOKENSELECT {__version__}")]
    return ["\n".join(lines[start : start + 6]) for start in starts]


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


def test_a_server_says_once_what_selects_with_which_settings(sparse_client, layers):
    [said] = start_logs(sparse_client.server.log())
    assert f"layers that select: {layers} of {layers} (layers 0-{layers - 1}: TOKENSELECT)" in said
    assert "vLLM's CPU attention for rows of several" in said
    assert "profile: none" in said
    assert "top_k *368, n_init *16, n_local *128, query_chunk *256, tail_queries *32" in said
    assert "min_context *0, vote local, positions native, workspace_mb 32" in said
    assert "prompts of up to 513 tokens, and by generated tokens contexts of up to 513" in said
