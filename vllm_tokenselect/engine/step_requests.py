"""The requests of a step, left by the hooks of both model runners for the metadata builder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from vllm_tokenselect.method.requests import RequestTable, StepRequests

# A variable of the context: engines of one process may run in threads of their own.
_current: ContextVar[StepRequests | None] = ContextVar("tokenselect_requests", default=None)

# By the configuration's id: builders know nothing else of their runner, which keeps both alive.
_tables: WeakValueDictionary[int, RequestTable] = WeakValueDictionary()


def current_requests() -> StepRequests | None:
    """Model Runner V1: requests of the step whose metadata is being built; None in a dummy run."""
    return _current.get()


@contextmanager
def publish_requests(requests: StepRequests | None) -> Iterator[None]:
    """Model Runner V1: make `requests` the current ones while metadata is built."""
    published = _current.set(requests)
    try:
        yield
    finally:
        _current.reset(published)


def request_table(vllm_config: Any) -> RequestTable | None:
    """Model Runner V2: requests of the engine's runner; None before the first was added."""
    return _tables.get(id(vllm_config))


def publish_table(vllm_config: Any, table: RequestTable) -> None:
    """Model Runner V2: make `table` the engine's, as long as its runner holds it."""
    _tables[id(vllm_config)] = table
