"""Images that meet in one query chunk are encoded in one step, whatever vLLM's encoder limits are.

vLLM ends a step before an image for which its encoder cache or its encoder budget has no room. Such a
step may end inside a query chunk. Then it computes nothing, and so do all later ones, since the images of a
chunk have to be there at once. Two requests could also wait for each other, each with the image that its
last step ended in.

Therefore one request at a time may go past both limits, by what the images of one chunk can need. It may
do so only in a step that would otherwise compute nothing, and for its next chunk alone. Others keep to
vLLM's limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.multimodal.utils import get_mm_features_in_window
from vllm.v1.request import RequestStatus

from vllm_tokenselect.method.prompt_steps import PromptSteps
from vllm_tokenselect.method.settings import Method

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.request import Request
else:
    _Scheduler = object  # vLLM's comes last among the bases


class EncodeWholeChunks(_Scheduler):
    """Room in the encoder cache for one request, to be put before vLLM's scheduler."""

    chunks: Method
    prompt_steps: PromptSteps

    def _make_encoder_room(self) -> None:
        cache = self.encoder_cache_manager
        self._encoder_limit = min(cache.cache_size, self.max_num_encoder_input_tokens)
        # An image may end in a chunk, others fill it, and another begin in it. vLLM refuses requests
        # with an image that is larger than the cache.
        room = 2 * cache.cache_size + self.chunks.query_chunk
        self._past_limits: Request | None = None
        can_allocate = cache.can_allocate

        def can_allocate_beside(
            request: Request, input_id: int, compute_budget: int, num_embeds_to_schedule: int
        ) -> bool:
            if request is self._past_limits:
                compute_budget += room
            else:
                num_embeds_to_schedule += room
            fits: bool = can_allocate(request, input_id, compute_budget, num_embeds_to_schedule)
            return fits

        cache.cache_size += room
        cache.num_free_slots += room
        cache.num_freeable_slots += room
        cache.can_allocate = can_allocate_beside

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        schedule = super()._try_schedule_encoder_inputs
        inputs = schedule(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        steps, prompt_len = self.prompt_steps, request.num_prompt_tokens
        if steps.fit(prompt_len, num_computed_tokens, inputs[1]) or not steps.fit(
            prompt_len, num_computed_tokens, num_new_tokens
        ):
            return inputs
        one_chunk = steps.shortest(prompt_len, num_computed_tokens)
        if not self._may_pass_limits(request, num_computed_tokens, one_chunk):
            return inputs
        self._past_limits = request
        return schedule(
            request, num_computed_tokens, one_chunk, encoder_compute_budget, shift_computed_tokens
        )

    def _may_pass_limits(self, request: Request, start: int, num_new_tokens: int) -> bool:
        """Whether waiting would not help, and nobody else is past the limits."""
        held = self.encoder_cache_manager.get_cached_input_ids
        if self._past_limits not in (None, request) and held(self._past_limits):
            return False
        if held(request):
            return True  # another may hold, likewise, what this one waits for
        features = request.mm_features
        window = slice(*get_mm_features_in_window(features, start, start + num_new_tokens))
        needed = {f.identifier: f.mm_position.get_num_embeds() for f in features[window]}
        return bool(sum(needed.values()) > self._encoder_limit)

    def _leave_encoder_cache(self, request: Request) -> None:
        """Give up the images of a request that gets no step, if it has not started."""
        if request.has_encoder_inputs and request.status != RequestStatus.RUNNING:
            self.encoder_cache_manager.free(request)
