"""Stable request slots on Model Runner V2, whose request table has stable rows of its own.

Wraps `RequestState.add_request` and `RequestState.remove_request`. Each metadata build names the rows
as `CommonAttentionMetadata.req_idx`; they are our slots. V2 adds a preempted request anew when it is
resumed, so a slot is reset then too.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_tokenselect.hooks.activity import log_activity
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.requests import RequestTable

SEAMS = (
    Seam(
        name="runner_v2",
        module="vllm.v1.worker.gpu.states",
        qualname="RequestState.add_request",
        parameters=("self", "req_id", "prompt_len"),
        contains=(
            "req_idx = self.free_indices.pop()",
            "self.req_id_to_index[req_id] = req_idx",
        ),
        why="resets the request's slot when it is added or resumed, and learns its prompt's length",
    ),
    Seam(
        name="runner_v2",
        module="vllm.v1.worker.gpu.states",
        qualname="RequestState.remove_request",
        parameters=("self", "req_id"),
        contains=("self.free_indices.append(req_idx)",),
        why="frees the request's slot when it ends or is preempted",
    ),
)

_table: RequestTable | None = None


def request_table() -> RequestTable | None:
    """The requests of this worker; None before the first was added."""
    return _table


def add_to_slot(state: Any, request_id: str, prompt_len: int) -> None:
    """Give the request the slot that V2 chose, after `add_request`."""
    global _table
    if _table is None or _table.capacity != state.max_num_reqs:
        _table = RequestTable(state.max_num_reqs)
    _table.add(request_id, prompt_len, 2048, slot=state.req_id_to_index[request_id])


def remove_from_slot(request_id: str) -> None:
    """Free the slot, after `remove_request`."""
    if _table is not None and request_id in _table:
        log_activity(request_id, _table.finish(request_id))


def install() -> None:
    """Wrap both methods; safe to call again."""
    from vllm.v1.worker.gpu.states import RequestState

    if "_tokenselect_add_request" in vars(RequestState):
        return
    if all(seam.require() == "patched" for seam in SEAMS):
        return
    add_request, remove_request = RequestState.add_request, RequestState.remove_request

    @functools.wraps(add_request)
    def add_request_and_slot(
        self: Any, req_id: str, prompt_len: int, *args: Any, **kwargs: Any
    ) -> None:
        add_request(self, req_id, prompt_len, *args, **kwargs)
        add_to_slot(self, req_id, prompt_len)

    @functools.wraps(remove_request)
    def remove_request_and_slot(self: Any, req_id: str) -> Any:
        remove_from_slot(req_id)
        return remove_request(self, req_id)

    RequestState._tokenselect_add_request = add_request
    RequestState.add_request = add_request_and_slot
    RequestState.remove_request = remove_request_and_slot
