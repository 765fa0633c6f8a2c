"""Where prefill steps of hybrid models end, whose layers without attention keep one state a request.

vLLM caches such a state for a prefix when a step ends with a block ("align"). Its own rule, which this one
replaces, also stops at the last whole block of a prompt, inside a query chunk. Here a step ends where a
chunk ends, and:

1. one that begins inside a block that may be shared ends at the block's end, at the latest: what is kept
   for a block is the state behind its last token;
2. no step passes the last place below the request's limit where a hit may end, so that there is a state;
3. otherwise a step ends with a block if it holds a whole one, and inside a block if it holds none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_tokenselect.method.settings import Method

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.request import Request
else:
    _Scheduler = object  # vLLM's comes last among the bases


class EndStepsWithStates(_Scheduler):
    """The rules, to be put before vLLM's scheduler among the bases of a class."""

    chunks: Method

    def _shareable_tokens(self, request: Request) -> int:
        """Tokens at the start of a request's prompt that may enter the prefix cache."""
        raise NotImplementedError

    def _last_hit(self, request: Request) -> int:
        """The last position at which a hit on a request's prompt may end."""
        raise NotImplementedError

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        if self.mamba_partial_cache_hit:
            # Hits end inside blocks, at whole chunks: vLLM's stops are more, and all at whole chunks.
            num_tokens: int = super()._mamba_block_aligned_split(
                request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
            )
            return num_tokens
        start: int = request.num_computed_tokens
        start += num_new_local_computed_tokens + num_external_computed_tokens
        if start >= max(request.num_prompt_tokens, request.num_tokens - 1):
            return num_new_tokens
        block = self.cache_config.block_size
        stops = [self._last_hit(request), request.shared_prefix_boundary]
        next_block = (start // block + 1) * block
        if start % block and next_block <= self._shareable_tokens(request):
            stops.append(next_block)
        whole = self.chunks.whole_chunks(request.num_prompt_tokens, start, num_new_tokens)
        end = min((stop for stop in stops if start < stop < start + whole), default=start + whole)
        last_block = end // block * block
        if start < last_block and end < self.chunks.tail_start(request.num_prompt_tokens):
            end = last_block
        return end - start
