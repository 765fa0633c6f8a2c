"""/metrics tells how much of their context requests attended to, whichever API server is asked."""

import json
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.oracle.cases import SETTINGS
from tests.server.conftest import FP32, SPARSE, Client, serving

pytestmark = pytest.mark.server

ROWS = "vllm:tokenselect_rows_total"
ATTENDED = "vllm:tokenselect_tokens_attended_total"
CONTEXT = "vllm:tokenselect_tokens_in_context_total"
NEW_TOKENS = 12


@dataclass(frozen=True)
class Counts:
    """The counters of a page, summed over engines."""

    reselected: float
    reused: float
    dense: float
    attended: float
    context: float

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, n) - getattr(other, n) for n in self.__annotations__))


def scrape(client: Client) -> list:
    """Samples of /metrics."""
    with urllib.request.urlopen(f"{client.server.base_url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


def counts(client: Client) -> Counts:
    samples = scrape(client)

    def total(name: str, **labels: str) -> float:
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )

    kinds = [total(ROWS, kind=kind) for kind in ("reselected", "reused", "dense")]
    return Counts(*kinds, total(ATTENDED), total(CONTEXT))


def settled_counts(client: Client) -> Counts:
    """The counters once they have all that came before: workers publish about once a second."""
    last = counts(client)
    while True:
        time.sleep(2)
        now = counts(client)
        if now == last:
            return now
        last = now


def sums_over(layers: int, lengths: range, most: int) -> int:
    """Over all layers and contexts, each of no more than `most` tokens."""
    return layers * sum(min(length, most) for length in lengths)


@pytest.fixture(scope="module")
def layers(smollm2) -> int:
    return json.loads((smollm2 / "config.json").read_text())["num_hidden_layers"]


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


def test_the_labels_are_those_of_vllms_own_metrics(sparse_client, prompts):
    sparse_client.complete(prompts(902, 100), 2)
    samples = scrape(sparse_client)
    own, ours = (
        [sample.labels for sample in samples if sample.name == name]
        for name in ("vllm:num_requests_running", CONTEXT)
    )
    assert own
    assert ours == [{**labels, "tp_rank": "0"} for labels in own]


def test_every_one_of_several_api_servers_tells_the_same_and_nothing_is_left_behind(
    smollm2, prompts, layers
):
    with tempfile.TemporaryDirectory() as folder:
        extra_args = (*FP32, "--api-server-count", "2")
        environment = {"TMPDIR": folder}
        with serving(smollm2, settings=SPARSE, extra_args=extra_args, env=environment) as client:
            first = complete_and_count(client, prompts(903, 1000), layers)
            # Connections are spread over the servers.
            assert [counts(client) for _ in range(8)] == [first] * 8
            assert list(Path(folder).glob("tokenselect-metrics-*"))
        assert not list(Path(folder).glob("tokenselect-metrics-*"))
