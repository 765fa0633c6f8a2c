"""A decoding step has no more context than the workspace of the GPU holds the scores of.

CUDA graphs replay a decoding step, and score all of its rows at once. The workspace mostly holds the scores
of all tokens that the KV cache does. But requests may share a prefix: then their contexts come to more than
the cache has. A request that would pass the limit gets no tokens in this step. It goes on when those before
it have ended, as one does that waits for KV blocks.

A step with a chunk of a prompt is not replayed, and has no limit from this chunk on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.replayed_steps import queries_per_request, replays_steps
from vllm_tokenselect.method.request_settings import requested_top_k

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.request import Request

    from vllm_tokenselect.gpu.limits import StepLimits
else:
    _Scheduler = object  # vLLM's comes last among the bases


class LimitGraphContexts(_Scheduler):
    """The limit, to be put before vLLM's scheduler among the bases of a class."""

    def _limit_contexts(self) -> None:
        self._replayed: StepLimits | None = None
        if replays_steps(self.vllm_config):
            from vllm_tokenselect.engine.graph_sizes import replayed_limits  # needs Triton

            self._replayed = replayed_limits(self.vllm_config)
        self._most_columns = self._replayed.score_columns if self._replayed is not None else 0
        self._most_queries = queries_per_request(self.vllm_config)
        self._columns = 0  # of the step that is being made
        self._is_replayed = True

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._columns, self._is_replayed = 0, True
        return super().schedule(*args, **kwargs)

    def _take_columns(self, request: Request, start: int, num_tokens: int) -> bool:
        """Whether so many of a request's next tokens from `start` on fit the step, which then has them."""
        limits = self._replayed
        if limits is None or not num_tokens:
            return True
        if num_tokens > self._most_queries:
            self._is_replayed = False
        columns = num_tokens * _width(limits, request, start + num_tokens)
        if self._is_replayed and self._columns + columns > self._most_columns:
            get_logger(__name__).warning_once(
                "TOKENSELECT: the contexts of a step come to more than the %d tokens of which the "
                "workspace holds the scores, so the last requests wait for others to end. For more of them "
                "at a time set workspace_mb higher than %d.",
                self._most_columns,
                limits.workspace_bytes >> 20,
            )
            return False
        self._columns += columns
        return True


def _width(limits: StepLimits, request: Request, context: int) -> int:
    """Columns of the last of a request's rows, which has most; none of a row that sees all."""
    method = limits.method
    extra_args = getattr(request.sampling_params, "extra_args", None)
    candidate_end = context - 1 - method.n_local
    if candidate_end - method.n_init <= requested_top_k(extra_args, method.top_k):
        return 0
    return limits.width_of(candidate_end)
