"""Stable request seats on Model Runner V2, whose request table has stable rows of its own.

Wraps `GPUModelRunner.add_requests` and `._remove_request`. Each metadata build names the rows as
`CommonAttentionMetadata.req_idx`; a row is our seat. V2 adds a preempted request anew when it is resumed,
and a streaming request for each new part of its input. Each time the seat has a new owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_tokenselect.engine.step_requests import publish_table
from vllm_tokenselect.hooks.request_top_k import top_k_of
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.requests import RequestTable

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

_MODULE = "vllm.v1.worker.gpu.model_runner"

SEAMS = (
    Seam(
        name="runner_v2",
        module=_MODULE,
        qualname="GPUModelRunner.add_requests",
        parameters=("self", "scheduler_output"),
        contains=(
            "for new_req_data in scheduler_output.scheduled_new_reqs:",
            "self._remove_request(req_id)",
            "self.req_states.add_request(",
            "req_index = self.req_states.req_id_to_index[req_id]",
        ),
        why="gives a request the seat of its row, with its prompt's length and its own settings",
        retired_by="vLLM tells a metadata builder which request a row was given to, with its parameters",
    ),
    Seam(
        name="runner_v2",
        module=_MODULE,
        qualname="GPUModelRunner._remove_request",
        parameters=("self", "req_id"),
        contains=("req_idx = self.req_states.remove_request(req_id)",),
        why="frees the request's seat when its row is freed",
        retired_by="vLLM tells a metadata builder when a row is freed",
    ),
)


def add_to_seat(runner: Any, new: NewRequestData) -> None:
    """Give the request the seat of the row that V2 chose."""
    states = runner.req_states
    table: RequestTable | None = runner.__dict__.get("_tokenselect_requests")
    if table is None:
        table = RequestTable(states.max_num_reqs)
        runner._tokenselect_requests = table
        publish_table(runner.vllm_config, table)
    table.add(
        new.req_id,
        new.prompt_len,
        top_k_of(runner, new.sampling_params),
        seat=states.req_id_to_index[new.req_id],
    )


def remove_from_seat(runner: Any, request_id: str) -> None:
    """Free the request's seat."""
    table: RequestTable | None = runner.__dict__.get("_tokenselect_requests")
    if table is not None:
        table.remove(request_id)


def _add_requests_and_seats(
    add_requests: Any, runner: Any, scheduler_output: SchedulerOutput
) -> None:
    add_requests(runner, scheduler_output)
    for new in scheduler_output.scheduled_new_reqs:
        add_to_seat(runner, new)


def _remove_request_and_seat(remove_request: Any, runner: Any, req_id: str) -> Any:
    remove_from_seat(runner, req_id)
    return remove_request(runner, req_id)


def install() -> None:
    """Wrap the methods; safe to call again."""
    add_requests, remove_request = SEAMS
    add_requests.wrap(_add_requests_and_seats)
    remove_request.wrap(_remove_request_and_seat)
