"""/metrics tells how much of their context requests attended to, whichever API server is asked."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.metrics.alarms import ALARMS, metrics
from tests.metrics.dashboard import EXPRESSIONS
from tests.oracle.cases import SETTINGS
from tests.server.conftest import FP32, SPARSE, Client, serving
from tests.server.counted import CONTEXT, Counts, counts, scrape, settled_counts, sums_over
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method

pytestmark = pytest.mark.server

NEW_TOKENS = 12


def complete_and_count(client: Client, prompt: list[int], layers: int) -> Counts:
    """What a completion added to the counters, once every query's context is in them."""
    before = settled_counts(client)
    client.complete(prompt, NEW_TOKENS)
    # The last token is generated, but never a query.
    queries = range(1, len(prompt) + NEW_TOKENS)
    expected = sums_over(layers, queries, most=len(prompt) + NEW_TOKENS)
    deadline = time.monotonic() + 10
    while (added := counts(client) - before).context < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert added.context == expected
    return added


def test_a_short_prompt_is_dense_and_all_of_its_context_is_attended_to(
    sparse_client, prompts, layers
):
    added = complete_and_count(sparse_client, prompts(900, 400), layers)
    assert added.attended == added.context
    assert (added.reselected, added.reused) == (0, 0)
    assert added.dense > 0


def test_of_a_long_context_queries_attend_to_what_the_settings_say(sparse_client, prompts, layers):
    added = complete_and_count(sparse_client, prompts(901, 2000), layers)
    queries = range(1, 2000 + NEW_TOKENS)
    at_least = SETTINGS.n_init + SETTINGS.top_k + SETTINGS.n_local
    assert added.attended >= sums_over(layers, queries, most=at_least)
    # A query also sees its chunk, or the tokens since the selection that it reuses.
    assert added.attended <= sums_over(layers, queries, most=at_least + SETTINGS.query_chunk)
    assert added.attended < 0.6 * added.context
    assert added.reselected > 0
    assert added.attended == layers * attended_by_definition(2000)


def attended_by_definition(prompt_len: int) -> int:
    """Tokens that a prompt and what is generated from it attend to in a layer, selecting each time."""
    end, method = prompt_len + NEW_TOKENS - 1, Method(**SPARSE)
    requests = BatchRequests.without_seats(np.array([prompt_len], np.int32), method.top_k)
    plan = SelectionPlan.build(np.array([0, end]), np.array([end]), requests, method)
    attended = plan.num_attended(method)
    # A generated token: at 16 + 368 + 128 tokens and at itself.
    assert set(attended[plan.chunk_start >= prompt_len]) == {513}
    return int(attended.sum())


def test_the_labels_are_those_of_vllms_own_metrics(sparse_client, prompts):
    sparse_client.complete(prompts(902, 100), 2)
    samples = scrape(sparse_client)
    own, ours = (
        [sample.labels for sample in samples if sample.name == name]
        for name in ("vllm:num_requests_running", CONTEXT)
    )
    assert own
    assert ours == [{**labels, "tp_rank": "0"} for labels in own]


def test_a_server_has_every_metric_that_alarms_and_dashboard_read(sparse_client, prompts):
    sparse_client.complete(prompts(904, 100), 2)
    read = set().union(*map(metrics, (*EXPRESSIONS, *(rule["expr"] for rule in ALARMS.values()))))
    assert read <= {sample.name for sample in scrape(sparse_client)}


def test_every_one_of_several_api_servers_tells_the_same_and_nothing_is_left_behind(
    smollm2, prompts, layers
):
    with tempfile.TemporaryDirectory() as folder:
        extra_args = (*FP32, "--api-server-count", "2")
        environment = {"TMPDIR": folder, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with serving(smollm2, settings=SPARSE, extra_args=extra_args, env=environment) as client:
            first = complete_and_count(client, prompts(903, 1000), layers)
            # Connections are spread over the servers.
            assert [counts(client) for _ in range(8)] == [first] * 8
            assert list(Path(folder).glob("tokenselect-metrics-*"))
        assert not list(Path(folder).glob("tokenselect-metrics-*"))
