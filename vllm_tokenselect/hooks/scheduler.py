"""vLLM's scheduler with the rules that make a result depend on the request alone.

Subclasses `Scheduler` and `AsyncScheduler`; overrides where a prefill step ends and where a
prefix-cache hit is cut, and limits what a request puts into the prefix cache. Nothing is copied.

1. A prefill step of a request ends at a multiple of `query_chunk`, at the start of its tail, or past
   it: a chunk is never split between steps, whose mean query would then be another.
2. Blocks enter the prefix cache only below the request's own limit, the last multiple of
   `query_chunk` before its tail, and a hit is cut at the reader's limit, at a multiple of
   `query_chunk`. What is shared was computed as whole chunks, and what follows starts with one.
   A streaming request whose input was continued shares nothing from then on.

`block_hashes` keeps what was computed by other settings apart, `preemption` chooses whom to preempt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks import block_hashes
from vllm_tokenselect.hooks.preemption import PreemptFewestComputed
from vllm_tokenselect.hooks.scheduler_seams import SEAMS

if TYPE_CHECKING:
    from vllm.v1.request import Request


class WholeChunks:
    """The rules, to be put before vLLM's scheduler among the bases of a class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for seam in SEAMS:
            seam.require()
        super().__init__(*args, **kwargs)
        self.tokenselect = TokenSelectConfig.from_additional_config(
            self.vllm_config.additional_config  # type: ignore[attr-defined]
        )
        self._hit_limit: int | None = None
        self._limit_prefix_cache()
        block_hashes.install()  # in the process where requests are hashed, and before any is

    def _limit_prefix_cache(self) -> None:
        coordinator = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        cache_blocks = coordinator.cache_blocks
        find_longest_cache_hit = coordinator.find_longest_cache_hit

        def cache_shareable_blocks(request: Request, num_computed_tokens: int) -> None:
            cache_blocks(request, min(num_computed_tokens, self._shareable_tokens(request)))

        def find_hit_below_limit(block_hashes: Any, max_cache_hit_length: int) -> Any:
            if self._hit_limit is not None:
                max_cache_hit_length = min(max_cache_hit_length, self._hit_limit)
            return find_longest_cache_hit(block_hashes, max_cache_hit_length)

        coordinator.cache_blocks = cache_shareable_blocks
        coordinator.find_longest_cache_hit = find_hit_below_limit

    def _shareable_tokens(self, request: Request) -> int:
        if hasattr(request, "_tokenselect_continued"):
            return 0
        return self.tokenselect.method.shareable_tokens(request.num_prompt_tokens)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        # What was the prompt's tail and answer is now in the middle of a prompt, where others compute
        # whole chunks; and the update may bring other settings than the hashes tell.
        session._tokenselect_continued = True

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any) -> Any:
        chunk = self.tokenselect.query_chunk
        self._hit_limit = self._shareable_tokens(request)
        try:
            while True:
                hit = super()._get_local_prefix_cache_hit(request, *args)  # type: ignore[misc]
                num_hit_tokens = hit[1]
                if num_hit_tokens > self._hit_limit:
                    raise RuntimeError(
                        f"vLLM's prefix cache gave {num_hit_tokens} tokens to request "
                        f"{request.request_id}, which may take {self._hit_limit}"
                    )
                if num_hit_tokens % chunk == 0:
                    return hit
                # Looked up again rather than cut: a sliding-window group holds blocks only of the
                # window before the end of a hit.
                self._hit_limit = num_hit_tokens // chunk * chunk
        finally:
            self._hit_limit = None

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        end = num_computed_tokens + num_new_tokens
        if end >= self.tokenselect.method.tail_start(request.num_prompt_tokens):
            return num_new_tokens
        chunk = self.tokenselect.query_chunk
        return max(end // chunk * chunk - num_computed_tokens, 0)


class TokenSelectScheduler(WholeChunks, PreemptFewestComputed, Scheduler):
    """vLLM's scheduler under the rules above."""


class TokenSelectAsyncScheduler(WholeChunks, PreemptFewestComputed, AsyncScheduler):
    """vLLM's asynchronous scheduler under the rules above."""
