"""Proof of activity: what a finished request attended to, in vLLM's log."""

from __future__ import annotations

from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.method.requests import Activity


def log_activity(request_id: str, activity: Activity | None) -> None:
    """Write the request's line; a request of which nothing was recorded has none."""
    if activity is not None:
        get_logger(__name__).info("TOKENSELECT request %s: %s", request_id, activity)
