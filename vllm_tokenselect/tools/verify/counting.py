"""What a server's counters say of one request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from vllm_tokenselect.tools.common.server_facts import ROW_KINDS, selection_counts

_EVERY = 1.5  # seconds; workers publish about once a second
_PATIENCE = 10.0  # seconds

Counts = Mapping[str, float]


async def settled_counts(url: str, before: Counts | None) -> Counts | None:
    """The counters once they have moved and stand still, or after ten seconds; None for a server without.

    Args:
        before: an earlier reading.
    """
    deadline = time.monotonic() + _PATIENCE
    last = selection_counts(url)
    while time.monotonic() < deadline:
        await asyncio.sleep(_EVERY)
        now = selection_counts(url)
        if now == last and now is not None and now != before:
            break
        last = now
    return last


def since(before: Counts | None, now: Counts) -> dict[str, float]:
    """What was counted between two readings."""
    return {name: count - (before or {}).get(name, 0.0) for name, count in now.items()}


def selecting_rows(counts: Counts) -> float:
    """Rows that did not attend to their whole context."""
    return sum(counts.get(kind, 0.0) for kind in ROW_KINDS if kind != "dense")


def in_words(counts: Counts) -> str:
    """`attended to 31.0% of the context; rows: 210 reselected, ...`."""
    rows = ", ".join(f"{counts.get(kind, 0.0):,.0f} {kind}" for kind in ROW_KINDS)
    return (
        f"attended to {counts['attended'] / counts['in_context']:.1%} of the context; rows: {rows}"
    )
