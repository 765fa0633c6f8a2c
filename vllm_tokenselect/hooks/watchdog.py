"""End a request that can never be scheduled. vLLM would try for ever.

vLLM's engine schedules anew as long as there are requests. If none of them gets a token although no step is
under way, the next attempt finds the same, and all requests behind the first one wait too. After many such
attempts the first request that could run ends with an error; the others go on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_tokenselect.engine.log import get_logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
else:
    _Scheduler = object  # vLLM's comes last among the bases

# Both have to pass: attempts take microseconds, and an engine may be asked rarely.
MOST_ATTEMPTS = 100
MOST_SECONDS = 2.0

# Requests of another status wait for something: a grammar, a stream's input.
_READY = (RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Stuck(NamedTuple):
    """A request to be ended, and why."""

    request_id: str
    reason: str


class EndStuckRequests(_Scheduler):
    """The watchdog, to be put before vLLM's scheduler among the bases of a class."""

    _attempts = 0
    _stuck_since = 0.0
    _stuck: Stuck | None = None

    def _waits_for_connector(self) -> bool:
        """Whether requests wait for a KV connector."""
        raise NotImplementedError

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        # Where prefills are deferred, others decode meanwhile, or a later attempt lets them in.
        under_way = self.sched_step_seq > self.processed_step_seq
        paused = self._pause_state != PauseState.UNPAUSED
        # Requests that a connector makes wait, or whose blocks others wait for, go on when it has answered.
        loading = self._waits_for_connector()
        if output.total_num_scheduled_tokens or under_way or paused or loading:
            self._attempts = 0
        elif (request := self._first_ready()) is not None:
            self._count(request)
        return output

    def _first_ready(self) -> Request | None:
        waiting = (*self.running, *self.kv_holding_waiting, *self.waiting)
        return next((request for request in waiting if request.status in _READY), None)

    def _count(self, request: Request) -> None:
        if not self._attempts:
            self._stuck_since = time.monotonic()
        self._attempts += 1
        seconds = time.monotonic() - self._stuck_since
        if self._attempts <= MOST_ATTEMPTS or seconds < MOST_SECONDS or self._stuck is not None:
            return
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        reason = (
            f"Request {request.request_id} ends with an error: in {self._attempts} attempts no step had "
            f"room for its next tokens, although nothing else runs ({request.num_computed_tokens} of "
            f"{request.num_tokens} tokens are computed, {request.status.name.lower()}; {free} KV blocks "
            f"are free, and a step holds {self.max_num_scheduled_tokens} tokens). Please report this with "
            "the server's options."
        )
        get_logger(__name__).error("TOKENSELECT: %s", reason)
        self._stuck = Stuck(request.request_id, reason)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        stuck, self._stuck = self._stuck, None
        ended: list[Request] = []
        if stuck is not None:
            self._attempts = 0
            ended = self.finish_requests(stuck.request_id, RequestStatus.FINISHED_ERROR)
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in ended:
            end = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=stuck.reason if stuck else None,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            of_client.outputs.append(end)
        return outputs
