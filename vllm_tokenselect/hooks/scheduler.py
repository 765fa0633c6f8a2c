"""vLLM's scheduler with the rules that make a result depend on the request alone.

Subclasses `Scheduler` and `AsyncScheduler`; overrides where a prefill step ends and where a
prefix-cache hit is cut, and limits what a request puts into the prefix cache. Nothing is copied.

1. A prefill step of a request ends at a multiple of `query_chunk`, at the start of its tail, or past
   it: a chunk is never split between steps, whose mean query would then be another. Where layers share
   selections, it is never so short that a CUDA graph of decoding steps might replay it (`PromptSteps`).
2. Blocks enter the prefix cache only below the request's own limit, the last multiple of
   `query_chunk` before its tail, and a hit is cut at the reader's limit, at a multiple of
   `query_chunk`. What is shared was computed as whole chunks, and what follows starts with one.
   A streaming request whose input was continued shares nothing from then on.
   `query_chunk` is what lines up with the KV blocks: `Method.for_blocks`.
3. Layers that keep few blocks of a prompt in the prefix cache, as sliding windows do, keep those
   before the request's limit, where a hit ends, and not those before the prompt's end.

`block_hashes` keeps what other settings computed apart, `connector_loads` limits what comes from a KV
connector, `preemption` chooses whom to preempt,
`engine.step_size` refuses options that make a step too small, `encoder_inputs` encodes all images of a
chunk, `hybrid_steps` ends steps where states are kept, `graph_contexts` keeps a decoding step to what the
workspace holds, `watchdog` ends a request that would wait for ever.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.replayed_steps import prompt_steps
from vllm_tokenselect.engine.step_size import check_steps
from vllm_tokenselect.hooks import block_hashes
from vllm_tokenselect.hooks.connector_loads import LimitLoads
from vllm_tokenselect.hooks.encoder_inputs import EncodeWholeChunks
from vllm_tokenselect.hooks.graph_contexts import LimitGraphContexts
from vllm_tokenselect.hooks.hybrid_steps import EndStepsWithStates
from vllm_tokenselect.hooks.preemption import PreemptFewestComputed
from vllm_tokenselect.hooks.scheduler_seams import SEAMS
from vllm_tokenselect.hooks.watchdog import EndStuckRequests
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.v1.request import Request


class WholeChunks(
    LimitLoads, EndStuckRequests, EncodeWholeChunks, EndStepsWithStates, LimitGraphContexts
):
    """The rules, to be put before vLLM's scheduler among the bases of a class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for seam in SEAMS:
            seam.require()
        super().__init__(*args, **kwargs)
        self.tokenselect = TokenSelectConfig.from_additional_config(
            self.vllm_config.additional_config
        )
        self.chunks = self.tokenselect.method.for_blocks(self.cache_config.block_size)
        self.prompt_steps = prompt_steps(self.vllm_config, self.chunks)
        self._check_steps()
        self._hit_limit: int | None = None
        # Where both a chunk and a block of every group end.
        self._alignment = math.lcm(self.chunks.query_chunk, self.block_size)
        self._limit_prefix_cache()
        self._limit_connectors()
        self._make_encoder_room()
        self._limit_contexts()
        block_hashes.install()  # in the process where requests are hashed, and before any is

    def _check_steps(self) -> None:
        """Check again with the block size that vLLM chose after the model was loaded."""
        block_size = self.cache_config.block_size
        check_steps(self.tokenselect, self.vllm_config, block_size, self.mamba_partial_cache_hit)
        chunk, unit = self.chunks.query_chunk, self.hash_block_size
        if chunk != self.tokenselect.query_chunk:
            get_logger(__name__).info(
                "TOKENSELECT: %d queries of a prompt select together, which lines up with KV blocks of %d "
                "tokens (query_chunk %d does not)",
                *(chunk, block_size, self.tokenselect.query_chunk),
            )
        if self.mamba_partial_cache_hit and self.prompt_steps.replayed:
            # vLLM ends a step at the last of these units, which may leave too few tokens of a prompt.
            raise SettingsError(
                f"prefix_match_unit={unit} cannot be used with the tokenselect setting anchor_layers="
                f"{self.chunks.anchor_layers!r} and CUDA graphs, which a prompt's end has to stay out of. "
                'Leave out --prefix-match-unit, or set anchor_layers to "all".'
            )
        if self.mamba_partial_cache_hit and unit % chunk:
            raise SettingsError(
                f"prefix_match_unit={unit} is not a multiple of the {chunk} queries that select together "
                "(tokenselect setting query_chunk): with it a prefill step of this hybrid model has to end "
                f"inside a query chunk. Leave out --prefix-match-unit, or set query_chunk to {unit}."
            )

    def _limit_prefix_cache(self) -> None:
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks
        find_longest_cache_hit = coordinator.find_longest_cache_hit

        # With drafts that read hidden states, the last block of a hit is dropped. Coordinators of several
        # groups look for one block more by themselves.
        alone = isinstance(coordinator, UnitaryKVCacheCoordinator)
        dropped = self.block_size if alone and self.use_eagle_block_drop else 0

        def cache_shareable_blocks(request: Request, num_computed_tokens: int) -> None:
            cache_blocks(request, min(num_computed_tokens, self._shareable_tokens(request)))

        def find_hit_below_limit(block_hashes: Any, max_cache_hit_length: int) -> Any:
            if self._hit_limit is not None:
                max_cache_hit_length = min(max_cache_hit_length, self._hit_limit + dropped)
            return find_longest_cache_hit(block_hashes, max_cache_hit_length)

        coordinator.cache_blocks = cache_shareable_blocks
        coordinator.find_longest_cache_hit = find_hit_below_limit
        for manager in coordinator.single_type_managers:
            manager.cache_blocks = self._keep_blocks_below_limit(manager.cache_blocks)

    def _keep_blocks_below_limit(self, cache_blocks: Any) -> Any:
        def cache_where_hits_end(request: Request, *args: Any, **kwargs: Any) -> None:
            end = self._last_hit(request)
            cache_blocks(request, *args, **{**kwargs, "replay_boundaries": (end,)})

        return cache_where_hits_end

    def _shareable_tokens(self, request: Request) -> int:
        return block_hashes.shareable_tokens(request, self.chunks)

    def _last_hit(self, request: Request) -> int:
        end = self._shareable_tokens(request) // self._alignment * self._alignment
        if self.use_eagle_block_drop:  # the last block of a hit is dropped
            end = max(end - self._alignment, 0)
        return end

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        # The former tail and answer are now in the middle of a prompt, where other requests compute whole
        # chunks. The update may also bring other settings than the hashes tell.
        session._tokenselect_continued = True
        super()._update_request_as_session(session, update)

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        chunk = self.chunks.query_chunk
        self._hit_limit = self._shareable_tokens(request)
        try:
            while True:
                hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
                num_hit_tokens = hit[1]
                if num_hit_tokens > self._hit_limit:
                    raise RuntimeError(
                        f"vLLM's prefix cache gave {num_hit_tokens} tokens to request "
                        f"{request.request_id}, which may take {self._hit_limit}"
                    )
                if num_hit_tokens % chunk == 0:
                    # vLLM keeps the blocks before this boundary for others, whose hits must end with a
                    # chunk.
                    shared = hit[2] // self._alignment * self._alignment
                    return (*hit[:2], shared if shared > num_hit_tokens else 0, *hit[3:])
                # Looked up again rather than cut: a sliding-window group holds blocks only of the
                # window before the end of a hit.
                self._hit_limit = num_hit_tokens // chunk * chunk
        finally:
            self._hit_limit = None

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        fitting = self.prompt_steps.fit(
            request.num_prompt_tokens, num_computed_tokens, num_new_tokens
        )
        if not self._take_columns(request, num_computed_tokens, fitting):
            fitting = 0
        if not fitting:
            self._leave_encoder_cache(request)
        return fitting

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Keep adapters to the limit: vLLM does not count those of running requests without a step."""
        ready: bool = super()._handle_blocked_waiting_request(request)
        if not ready or self.lora_config is None or request.lora_request is None:
            return ready
        loras = {r.lora_request.lora_int_id for r in self.running if r.lora_request is not None}
        loras.add(request.lora_request.lora_int_id)
        return bool(len(loras) <= self.lora_config.max_loras)


class TokenSelectScheduler(WholeChunks, PreemptFewestComputed, Scheduler):
    """vLLM's scheduler under the rules above."""


class TokenSelectAsyncScheduler(WholeChunks, PreemptFewestComputed, AsyncScheduler):
    """vLLM's asynchronous scheduler under the rules above."""
