"""The steps of the method over one sequence, in their order.

Decide which chunks select (`chunks_of`) and which tokens reuse a selection; score, vote and choose
(`Select`); put the attended set together; attend. Whoever needs a forward pass with selection calls this:
`model.losses(tokens, count, SelectiveAttention(method, chunks_of(...)))`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.inspect.selections import (
    Chunk,
    Select,
    attended_positions,
    by_vote,
    by_votes,
)

BATCH = 16  # single tokens that are attended for together


class SelectiveAttention:
    """Attention of every layer over the sink, what was selected, and the local window.

    Called for the layers in their order, forward after forward: what generated tokens have selected in an
    anchor is kept for the layers above it.

    Args:
        method: the settings, with native positions.
        chunks: of the whole sequence. A call may have the queries of some of them only, in whole chunks; a
            chunk that attends to everything may be divided.
        select: how each chunk selects. Default: the method's own way.
    """

    def __init__(self, method: Method, chunks: Sequence[Chunk], select: Select = by_vote) -> None:
        self._method = method
        self._chunks = chunks
        self._select = select
        self._selecting: list[int] = []  # layers of this forward, up to the current one
        self._shared: dict[int, torch.Tensor] = {}  # by position, what the last anchor has selected

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        if layer < self._method.dense_layers:
            return None
        anchor = self._enter(layer)
        out = torch.empty_like(query)
        first = key.shape[1] - query.shape[1]  # the position of the first query
        chunks = self._chunks_of(first, key.shape[1])
        singles = [chunk for chunk in chunks if _selects_alone(chunk)]
        for chunk in chunks:
            if _selects_alone(chunk):
                continue
            rows = slice(chunk.start - first, chunk.end - first)
            seen = attended_by(self._select, chunk, query[:, rows], key, scale, self._method)
            keys, values = key[:, seen], value[:, seen]
            n, m = chunk.end - chunk.start, keys.shape[1]
            mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
            out[:, rows] = _attend(query[:, rows], keys, values, mask, scale)
        for batch in _batches(singles):
            places = [chunk.start - first for chunk in batch]
            asking = query[:, places]  # [Hq, n, D]
            if batch[0].follows and not anchor:
                selections = torch.stack([self._shared[chunk.start] for chunk in batch])
            else:
                selections = self._select_each(batch, asking, key, scale)
            if batch[0].follows:
                self._shared |= {
                    c.start: chosen for c, chosen in zip(batch, selections, strict=True)
                }
            attended = torch.stack(
                [
                    attended_positions(chunk, chosen, self._method)
                    for chunk, chosen in zip(batch, selections, strict=True)
                ]
            )
            # A mask over all tokens is faster than gathering the tokens of each query.
            mask = torch.zeros(len(batch), key.shape[1], dtype=torch.bool, device=query.device)
            out[:, places] = _attend(asking, key, value, mask.scatter_(1, attended, True), scale)
        return out

    def _enter(self, layer: int) -> bool:
        """Take a layer as the next one that selects, and tell whether it is an anchor."""
        if self._selecting and layer <= self._selecting[-1]:
            self._selecting = []
        place = len(self._selecting)
        self._selecting.append(layer)
        setting = self._method.anchor_layers
        if place == 0 or setting == "all":
            return True
        return place % setting == 0 if isinstance(setting, int) else layer in setting

    def _chunks_of(self, first: int, end: int) -> list[Chunk]:
        """The chunks of tokens [first, end)."""
        chunks = [chunk for chunk in self._chunks if chunk.start < end and first < chunk.end]
        chunks = [
            replace(chunk, start=max(chunk.start, first), end=min(chunk.end, end))
            if chunk.candidates is None
            else chunk
            for chunk in chunks
        ]
        if sum(chunk.end - chunk.start for chunk in chunks) != end - first:
            raise ValueError(f"tokens {first:,} to {end:,} are not whole chunks")
        return chunks

    def _select_each(
        self, singles: Sequence[Chunk], asking: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self._select is by_vote:
            return by_votes(singles, asking, key, scale)
        queries = [asking[:, index : index + 1] for index in range(len(singles))]
        each = zip(singles, queries, strict=True)
        return torch.stack([self._select(chunk, query, key, scale) for chunk, query in each])


def attended_by(
    select: Select,
    chunk: Chunk,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    method: Method,
) -> slice | torch.Tensor:
    """Positions that a chunk's queries [Hq, n, D] attend to, before causality, of all keys [Hkv, T, D]."""
    if chunk.candidates is None:
        return slice(0, chunk.end)
    return attended_positions(chunk, select(chunk, queries, keys, scale), method)


def share_reused(
    query: torch.Tensor, num_kv_heads: int, tail: list[Chunk], method: Method
) -> float | None:
    """Share of consecutive single tokens that would reuse a selection, by the Selection Cache's rule.

    None where the settings have no Selection Cache, or there is no such token.
    """
    if not method.reuses_selections or not tail:
        return None
    last: tuple[torch.Tensor, int] | None = None
    reused = 0
    for chunk in tail:
        own = query[:, chunk.start].reshape(num_kv_heads, -1).float()
        if last is not None:
            similarity = float(torch.cosine_similarity(own, last[0], dim=1).min())
            if (
                similarity >= method.similarity_threshold
                and chunk.start - last[1] <= method.refresh_interval
            ):
                reused += 1
                continue
        last = own, chunk.start
    return reused / len(tail)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    # In four dimensions: with three PyTorch takes a slower path.
    inputs = (query[None], key[None], value[None])
    return F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale, enable_gqa=True)[0]


def _batches(singles: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Single tokens of one kind, to be attended for together."""
    for follows in (False, True):
        kind = [chunk for chunk in singles if chunk.follows == follows]
        for start in range(0, len(kind), BATCH):
            yield kind[start : start + BATCH]


def _selects_alone(chunk: Chunk) -> bool:
    return chunk.candidates is not None and chunk.end - chunk.start == 1
