"""Stable request seats on Model Runner V1, whose batch rows move between steps.

Wraps `GPUModelRunner._update_states`, which is told which requests were added, resumed, preempted and
finished, and `GPUModelRunner._build_attention_metadata`, during which the metadata builder is told which
request is in which row. `CPUModelRunner` inherits both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.engine.step_requests import publish_requests
from vllm_tokenselect.hooks.request_top_k import top_k_of
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.requests import RequestTable, StepRequests

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_RETIRED_BY = "vLLM drops Model Runner V1, whose rows move, for V2"

SEAMS = (
    Seam(
        name="runner_v1",
        module="vllm.v1.worker.gpu_model_runner",
        qualname="GPUModelRunner._update_states",
        parameters=("self", "scheduler_output"),
        contains=(
            "for req_id in scheduler_output.finished_req_ids:",
            "for new_req_data in scheduler_output.scheduled_new_reqs:",
            "resumed_req_ids = scheduler_output.scheduled_cached_reqs.resumed_req_ids",
        ),
        why="gives a request its seat when it is added or resumed and takes it back at its end",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="runner_v1",
        module="vllm.v1.worker.gpu_model_runner",
        qualname="GPUModelRunner._build_attention_metadata",
        parameters=("self", "num_tokens", "num_reqs"),
        contains=("num_scheduled_tokens: dict[str, int] | None = None", "self.input_batch"),
        why="tells the metadata builder which request is in which row of the batch",
        retired_by=_RETIRED_BY,
    ),
)


def update_seats(table: RequestTable, runner: Any, output: SchedulerOutput) -> None:
    """Bring the table up to date after `_update_states`."""
    for request_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
        table.remove(request_id)
    resumed = output.scheduled_cached_reqs.resumed_req_ids
    for request_id in (*(new.req_id for new in output.scheduled_new_reqs), *resumed):
        request = runner.requests[request_id]
        table.add(request_id, request.num_prompt_tokens, top_k_of(runner, request.sampling_params))


@contextmanager
def requests_of_step(
    table: RequestTable, runner: Any, num_reqs: int, dummy: bool
) -> Iterator[None]:
    """Publish the rows' requests while the metadata is built."""
    seats = None if dummy else table.seats_of(runner.input_batch.req_ids[:num_reqs])
    with publish_requests(None if seats is None else StepRequests(table, seats)):
        yield


def table_of(runner: Any) -> RequestTable:
    """The runner's table of requests, made when it is first asked for."""
    table: RequestTable | None = runner.__dict__.get("_tokenselect_requests")
    if table is None:
        table = RequestTable(runner.scheduler_config.max_num_seqs)
        runner._tokenselect_requests = table
    return table


def _update_states_and_seats(
    update_states: Any, runner: Any, scheduler_output: SchedulerOutput
) -> Any:
    result = update_states(runner, scheduler_output)
    update_seats(table_of(runner), runner, scheduler_output)
    return result


def _build_with_requests(
    build_attention_metadata: Any,
    runner: Any,
    num_tokens: int,
    num_reqs: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    dummy = kwargs.get("num_scheduled_tokens") is None
    with requests_of_step(table_of(runner), runner, num_reqs, dummy):
        return build_attention_metadata(runner, num_tokens, num_reqs, *args, **kwargs)


def install() -> None:
    """Wrap both methods; safe to call again."""
    update_states, build_metadata = SEAMS
    update_states.wrap(_update_states_and_seats)
    build_metadata.wrap(_build_with_requests)
