"""How many tokens a request attended to, by the counters in the server's `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_tokenselect.tools.common.server_facts import selection_counts


@dataclass(frozen=True)
class Attended:
    """Sums over the queries of a request: tokens attended to, in the mean layer, and in the context."""

    attended: float
    context: float
    queries: int

    def __add__(self, other: Attended) -> Attended:
        return Attended(
            self.attended + other.attended,
            self.context + other.context,
            self.queries + other.queries,
        )

    @property
    def share(self) -> float:
        """Attended tokens as a share of the context, 0..1; 1 when there was no query."""
        return self.attended / self.context if self.context else 1.0

    @property
    def mean_attended(self) -> float:
        """Tokens that a query attended to, on average."""
        return self.attended / self.queries if self.queries else 0.0

    @property
    def mean_context(self) -> float:
        """Tokens that a query had in its context, on average."""
        return self.context / self.queries if self.queries else 0.0


def wait_for_figures(
    url: str,
    before: Mapping[str, float] | None,
    contexts: range,
    layers: int,
    timeout: float = 10.0,
) -> Attended | None:
    """Wait until a request is in the counters, which workers publish about once a second.

    Args:
        url: the server, on which the request was alone.
        before: the server's `selection_counts` before the request.
        contexts: tokens in the context of each of the request's queries.
        layers: of the model.
        timeout: seconds to wait.

    Returns:
        what the request attended to; None when the counters do not have all of it in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        if (now := selection_counts(url)) is not None:
            attended, context = (
                (now[name] - (before or {}).get(name, 0.0)) / layers
                for name in ("attended", "in_context")
            )
            if context >= sum(contexts):
                return Attended(attended, context, len(contexts))
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
