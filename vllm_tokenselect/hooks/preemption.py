"""Preemption takes the request with the fewest computed tokens.

A preempted request is computed anew, so a resident context of a million tokens must be the last to go.
vLLM's FCFS policy preempts the last of its list of running requests, which is also the order in
which they take tokens from the step's budget. So the list is sorted, most computed first, only for a
step that may run short of blocks, and is put back in order after it. If it stayed sorted, a long prefill
would take whole steps from the requests that generate.

The request with the most computed tokens is preempted only when it is alone. While blocks are short it is
served first, so it ends, and then the next one does. This gives up what vLLM promises those who came first:
that they are never preempted for the sake of later ones.

vLLM's `priority` policy, which chooses by priority and time of arrival, stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.request import Request
else:
    _Scheduler = object  # vLLM's comes last among the bases


class PreemptFewestComputed(_Scheduler):
    """The order of preemption, to be put before vLLM's scheduler among the bases of a class."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        schedule = super().schedule
        if self.policy != SchedulingPolicy.FCFS or not blocks_may_run_short(self):
            return schedule(*args, **kwargs)
        order = {request.request_id: index for index, request in enumerate(self.running)}
        self.running.sort(key=lambda request: request.num_computed_tokens, reverse=True)
        output = schedule(*args, **kwargs)
        # Those that were admitted in this step stay behind the others.
        self.running.sort(key=lambda request: order.get(request.request_id, len(order)))
        return output


def blocks_may_run_short(scheduler: Scheduler) -> bool:
    """Whether the next step might have to preempt a running request.

    True too often rather than too rarely: each request counts with the whole budget of the step, and
    blocks that leave a sliding window do not count as free. What state-space layers of a hybrid
    model keep beside their blocks is not counted; where only that makes blocks run short, vLLM's
    order decides.
    """
    cache = scheduler.kv_cache_manager
    free: int = cache.block_pool.get_num_free_blocks()
    groups = cache.coordinator.single_type_managers
    budget = scheduler.max_num_scheduled_tokens
    lookahead = scheduler.num_lookahead_tokens
    running = scheduler.running
    # Every request begins at most one block more than its tokens fill. That mostly settles it, without
    # a look at the requests.
    tokens = budget + len(running) * lookahead
    if sum(tokens // group.block_size + len(running) for group in groups) <= free:
        return False
    needed = 0
    for request in running:
        slots = _slots_after_step(request, budget) + lookahead
        slots = min(slots, scheduler.max_model_len)
        for group in groups:
            owned = len(group.req_to_blocks.get(request.request_id, ()))
            needed += max(-(-slots // group.block_size) - owned, 0)
    return needed > free


def _slots_after_step(request: Request, budget: int) -> int:
    """Tokens, drafts and tokens still being sampled that need a slot after the step, at most."""
    wanted: int = request.num_tokens_with_spec + request.num_output_placeholders
    computed: int = request.num_computed_tokens
    return min(wanted, computed + budget)
