"""How many tokens a request attended to, read from the server's log.

The backend writes one line for each finished request when the setting `log_requests` is true.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

_COUNTS = r"attended (\d+) of (\d+) tokens in context over (\d+) queries"
_LINE = re.compile(rf"TOKENSELECT request (\S+): prefill {_COUNTS}; decode {_COUNTS}")


@dataclass(frozen=True)
class Attended:
    """Sums over queries: tokens attended to, tokens in the context, and the number of queries."""

    attended: int
    context: int
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


@dataclass(frozen=True)
class RequestFigures:
    """What one request attended to, in prefill and in decoding."""

    request_id: str
    prefill: Attended
    decode: Attended

    @property
    def total(self) -> Attended:
        """Of all of the request."""
        return self.prefill + self.decode


def parse_figures(log: str) -> list[RequestFigures]:
    """Every request's figures in the text of a server's log, in the log's order."""
    figures = []
    for request_id, *counts in _LINE.findall(log):
        numbers = [int(count) for count in counts]
        figures.append(RequestFigures(request_id, Attended(*numbers[:3]), Attended(*numbers[3:])))
    return figures


def wait_for_figures(
    log_path: Path, request_id: str, timeout: float = 10.0
) -> RequestFigures | None:
    """Wait until the log has the figures of a request; None when they do not come in time.

    Args:
        log_path: the server's log.
        request_id: the id in the API's response; vLLM's own id may have a suffix to it.
        timeout: seconds to wait.
    """
    deadline = time.monotonic() + timeout
    while True:
        log = log_path.read_text(encoding="utf-8", errors="replace")
        for figures in reversed(parse_figures(log)):
            if figures.request_id.startswith(request_id):
                return figures
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
