"""How much of full attention each way to select keeps, layer by layer.

The model reads a prompt with full attention. For some chunks of queries, and for some single tokens of the
prompt's tail, two measures are taken of each way to select: the share of attention that falls on the tokens
it attends to, and the relative error of its output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import fmean

import torch

from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.inspect.model import DiagnosedModel, UnsupportedModel
from vllm_tokenselect.tools.inspect.selections import (
    TOKENSELECT,
    WAYS,
    Chunk,
    causal_scores,
    chunks_of,
    spread,
)
from vllm_tokenselect.tools.inspect.selective import attended_by, share_reused

CHUNKS, TOKENS = "chunks of the prompt", "single tokens"
# A layer that looks at few tokens keeps more than this share of its attention, at any useful budget.
DIFFUSE_BELOW = 0.9


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        mass: share of attention on the attended tokens, 0 to 1, by kind of chunk and way to select.
        error: relative error of the output, likewise.
        reuse: share of the tail's tokens that would reuse a selection if they were generated; None if
            the settings have no Selection Cache.
    """

    layer: int
    mass: dict[str, dict[str, float]]
    error: dict[str, dict[str, float]]
    reuse: float | None


class NothingSelects(ValueError):
    """The prompt is so short that no query selects. The message says how long it must be."""


def compare_layers(
    model: DiagnosedModel,
    tokens: list[int],
    method: Method,
    num_chunks: int = 3,
    num_tokens: int = 16,
) -> list[LayerReport]:
    """Compare all ways to select at the settings' budget, in every layer that selects.

    Args:
        model: reads the prompt once, with full attention.
        tokens: of the prompt.
        method: the settings, with native positions.
        num_chunks: number of chunks to measure, the last ones of several queries.
        num_tokens: number of single tokens of the prompt's tail to measure, evenly spread.

    Raises:
        NothingSelects: when no chunk of the prompt selects.
        UnsupportedModel: when no layer selects.
    """
    selecting = [c for c in chunks_of(method, len(tokens), len(tokens)) if c.candidates is not None]
    if not selecting:
        raise NothingSelects(
            f"A prompt of {len(tokens):,} tokens is attended to in full: with n_init {method.n_init}, "
            f"top_k {method.top_k} and n_local {method.n_local} it must have more than "
            f"{method.selection_size + method.n_local:,}. Give a longer prompt or a smaller top_k."
        )
    singles = [chunk for chunk in selecting if chunk.end - chunk.start == 1]
    several = [chunk for chunk in selecting if chunk.end - chunk.start > 1]
    step = max(len(singles) // num_tokens, 1)
    watch = _Watch(
        method, {CHUNKS: several[-num_chunks:], TOKENS: singles[::-step][:num_tokens]}, singles
    )
    model.losses(tokens, 1, watch)
    if not watch.reports:
        raise UnsupportedModel(
            "No layer of this model selects: all have a sliding window, or are among the first "
            f"{method.dense_layers} that the setting dense_layers leaves dense."
        )
    return [watch.reports[layer] for layer in sorted(watch.reports)]


def diffuse_layers(layers: Sequence[LayerReport]) -> int:
    """How many of the first layers spread their attention so widely that no selection keeps most of it.

    The setting `dense_layers` is made for these layers.
    """
    kept = [min(ways[TOKENSELECT] for ways in report.mass.values() if ways) for report in layers]
    return len(list(takewhile(lambda share: share < DIFFUSE_BELOW, kept)))


@dataclass
class _Watch:
    """Attention that changes nothing and measures every layer."""

    method: Method
    measured: dict[str, list[Chunk]]
    tail: list[Chunk]
    reports: dict[int, LayerReport] = field(default_factory=dict)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> None:
        if layer < self.method.dense_layers:
            return
        mass: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        error: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for kind, chunks in self.measured.items():
            for chunk in chunks:
                for way, (kept, off) in self._measure(chunk, query, key, value, scale).items():
                    mass[kind][way].append(kept)
                    error[kind][way].append(off)
        reuse = share_reused(query, key.shape[0], self.tail, self.method)
        self.reports[layer] = LayerReport(layer, _means(mass), _means(error), reuse)

    def _measure(
        self,
        chunk: Chunk,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> dict[str, tuple[float, float]]:
        positions = spread(chunk)
        keys, values = key[:, : chunk.end], value[:, : chunk.end].float()
        scores = causal_scores(query[:, positions].float(), positions, keys, scale)
        shares = scores.softmax(dim=-1)
        full = _weighted(shares, values)
        found = {}
        queries = query[:, chunk.start : chunk.end]
        for way, select in WAYS.items():
            seen = attended_by(select, chunk, queries, keys, scale, self.method)
            kept = shares[:, :, seen].sum(dim=-1)
            out = _weighted(scores[:, :, seen].softmax(dim=-1), values[:, seen])
            off = (out - full).norm(dim=(0, 2)) / full.norm(dim=(0, 2))
            found[way] = float(kept.mean()), float(off.mean())
        return found


def _weighted(shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Outputs [Hq, n, D] of shares [Hq, n, m] over values [Hkv, m, D]."""
    heads, count, length = shares.shape
    grouped = shares.reshape(len(values), -1, length)
    return (grouped @ values).view(heads, count, -1)


def _means(measured: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {kind: {way: fmean(v) for way, v in ways.items()} for kind, ways in measured.items()}
