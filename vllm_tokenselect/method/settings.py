"""The numbers that define the method, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# `all`, every n-th, or these layers.
AnchorLayers = Literal["all"] | int | tuple[int, ...]

# The `top_k` of a request that attends to its whole context: more candidates than any context has.
FULL_ATTENTION = 1 << 30


class SettingsError(ValueError):
    """Settings that cannot be served. The message names the value and what is allowed."""


@dataclass(frozen=True)
class Method:
    """Which tokens the chunks of a request attend to.

    The defaults follow the paper (arXiv 2411.02886) but for `tail_queries`, which is ours: averaging
    the question with the text before it was what cost accuracy. `similarity_threshold` is the paper's,
    but asked of every KV head, where the paper asks it of all heads at once: 0.8 reuses four times as
    many selections, and loses 7 of 96 numbers that 0.9 finds (docs/accuracy.md).

    Attributes:
        top_k: tokens selected by vote for each chunk, in every layer.
        n_init: first tokens of the context, always attended (attention sinks).
        n_local: tokens directly before a chunk, always attended.
        query_chunk: queries of a prompt that select together.
        tail_queries: queries at the end of the prompt that each select for themselves.
        similarity_threshold: cosine of a generated token's query with that of the last selection,
            in every KV head, from which on the selection is reused; at 1 or above none is.
        refresh_interval: most tokens that may have left the local window since a reused selection.
        dense_layers: first layers of the model, which attend to everything.
        anchor_layers: layers in which a generated token selects: `all`, every n-th of the layers that
            select, or layers by their numbers. In any other it attends to what the anchor below has
            selected. Prompts select in every layer.
        min_context: longest context of which a generated token attends to everything, in every layer.
        vote: where a layer's heads are divided among processes, whether each process selects with its
            own (`local`) or all together (`global`), which then select the same tokens.
        positions: `native`: keys are cached as the model rotates them. `reassigned`: keys are cached
            before their rotation, and the tokens that a query attends to get the positions
            `0 .. m - 1` in their order; so no position passes what the model was trained on.
    """

    top_k: int = 2048
    n_init: int = 128
    n_local: int = 512
    query_chunk: int = 512
    tail_queries: int = 64
    similarity_threshold: float = 0.9
    refresh_interval: int = 64
    dense_layers: int = 0
    anchor_layers: AnchorLayers = "all"
    min_context: int = 0
    vote: Literal["local", "global"] = "local"
    positions: Literal["native", "reassigned"] = "native"

    @property
    def reassigns_positions(self) -> bool:
        return self.positions == "reassigned"

    @property
    def reuses_selections(self) -> bool:
        """Whether there is a Selection Cache."""
        return self.similarity_threshold < 1

    @property
    def shares_selections(self) -> bool:
        """Whether layers attend to what another one has selected."""
        return self.anchor_layers not in ("all", 1)

    @property
    def selection_size(self) -> int:
        """Tokens that every query of a chunk attends to: the sink and what was selected."""
        return self.n_init + self.top_k

    @property
    def attended_before(self) -> int:
        """Tokens before a chunk that it attends to when it selects.

        So it is also the last position at which a chunk may start and still see its whole context.
        """
        return self.selection_size + self.n_local

    @property
    def max_attended(self) -> int:
        """Most tokens that one chunk attends to: the width of the sparse block table."""
        generated = 1 + (self.refresh_interval if self.reuses_selections else 0)
        return self.attended_before + max(self.query_chunk, generated)

    def for_blocks(self, block_size: int) -> Method:
        """The same method with query chunks that line up with the blocks of the KV cache.

        Chunks are no longer than `query_chunk`: as many whole blocks as fit, or an equal part of a
        block. Blocks of 128 tokens leave 512 as it is, 80 make 480 of it, and 528 make 264. Of a block of
        16 to 8,192 tokens whose length is a multiple of 16, more than half of 512 is always left.
        """
        return replace(self, query_chunk=_largest_that_fits(self.query_chunk, block_size))

    def tail_start(self, num_prompt_tokens: int) -> int:
        """Position from which every query is a chunk of its own (`s` in the method)."""
        return max(num_prompt_tokens - self.tail_queries, 0)

    def whole_chunks(self, num_prompt_tokens: int, start: int, num_tokens: int) -> int:
        """As many of a prompt's tokens from `start` on as end where a step may end: no chunk is split."""
        end = start + num_tokens
        if end >= self.tail_start(num_prompt_tokens):
            return num_tokens
        return max(end // self.query_chunk * self.query_chunk - start, 0)

    def next_chunk(self, num_prompt_tokens: int, start: int) -> int:
        """The fewest of a prompt's tokens from `start` on that end where a step may end."""
        end = (start // self.query_chunk + 1) * self.query_chunk
        return max(min(end, self.tail_start(num_prompt_tokens)) - start, 1)

    def shareable_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens at the start of a prompt that whole query chunks compute.

        Only these may enter the prefix cache or be taken from it: what follows depends on where
        this prompt ends.
        """
        return self.tail_start(num_prompt_tokens) // self.query_chunk * self.query_chunk


def _largest_that_fits(chunk: int, block_size: int) -> int:
    """The largest length up to `chunk` that is a multiple of the block, or else divides it."""
    if block_size <= chunk:
        return chunk // block_size * block_size
    return next(n for n in range(chunk, 0, -1) if block_size % n == 0)
