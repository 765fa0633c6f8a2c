"""What a server's counters say, read from its `/metrics`."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Client

ROWS = "vllm:tokenselect_rows_total"
ATTENDED = "vllm:tokenselect_tokens_attended_total"
CONTEXT = "vllm:tokenselect_tokens_in_context_total"


@dataclass(frozen=True)
class Counts:
    """The counters of a page, summed over engines."""

    reselected: float
    reused: float
    dense: float
    attended: float
    context: float

    def __sub__(self, other: Counts) -> Counts:
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
