"""What selection costs a model in what it predicts, budget by budget, and the smallest that will do.

The model reads each passage with full attention and with the method's attention in its place; the last
tokens of a passage, those that count, are read as generated tokens are: each selects for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_tokenselect.diagnosis.model import DiagnosedModel
from vllm_tokenselect.diagnosis.selections import (
    Chunk,
    attended_positions,
    by_vote,
    by_votes,
    chunks_of,
)
from vllm_tokenselect.evaluation.intervals import mean_interval
from vllm_tokenselect.method import Method

BATCH = 16  # single tokens that are computed together, each with its own keys and values


@dataclass(frozen=True)
class Passage:
    """Tokens, of which the last `count` are predicted; `kind` tells what it is in the report."""

    kind: str
    tokens: list[int]
    count: int


@dataclass(frozen=True)
class BudgetCost:
    """What one `top_k` costs on one kind of passage.

    Attributes:
        loss: mean negative log-likelihood a token with full attention, nats.
        added: what the method adds to it, mean over passages.
        low, high: 95 % interval of `added`; None for a single passage.
    """

    top_k: int
    kind: str
    passages: int
    loss: float
    added: float
    low: float | None
    high: float | None


class SelectiveAttention:
    """The method as attention of a model that reads one sequence.

    Args:
        method: the settings, with native positions.
        num_tokens: of the sequence.
        num_generated: how many of the last tokens are read as if they had been generated.
    """

    def __init__(self, method: Method, num_tokens: int, num_generated: int) -> None:
        self._method = method
        chunks = chunks_of(method, num_tokens, num_tokens - num_generated)
        self._singles = [c for c in chunks if c.candidates is not None and c.end - c.start == 1]
        self._several = [c for c in chunks if c.candidates is None or c.end - c.start > 1]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for chunk in self._several:
            seen = (
                slice(0, chunk.end)
                if chunk.candidates is None
                else self._seen(chunk, query, key, scale)
            )
            rows = slice(chunk.start, chunk.end)
            keys, values = key[:, seen], value[:, seen]
            n, m = chunk.end - chunk.start, keys.shape[1]
            mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
            out[:, rows] = F.scaled_dot_product_attention(
                query[:, rows], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
        for first in range(0, len(self._singles), BATCH):
            batch = self._singles[first : first + BATCH]
            positions = [chunk.start for chunk in batch]
            asking = query[:, positions]  # [Hq, n, D]
            chosen = by_votes(batch, asking, key, scale)
            seen = torch.stack(
                [attended_positions(c, s, self._method) for c, s in zip(batch, chosen, strict=True)]
            )
            attended = F.scaled_dot_product_attention(
                asking.transpose(0, 1)[:, :, None],
                key[:, seen].transpose(0, 1),  # [n, Hkv, m, D]
                value[:, seen].transpose(0, 1),
                scale=scale,
                enable_gqa=True,
            )
            out[:, positions] = attended[:, :, 0].transpose(0, 1)
        return out

    def _seen(
        self, chunk: Chunk, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return attended_positions(chunk, by_vote(chunk, query, key, scale), self._method)


def budget_costs(
    model: DiagnosedModel, passages: Sequence[Passage], method: Method, budgets: Sequence[int]
) -> Iterator[BudgetCost]:
    """What each `top_k` of `budgets` costs on each kind of passage, as they are done."""
    full = [model.losses(p.tokens, p.count).mean().item() for p in passages]
    for top_k in budgets:
        own = replace(method, top_k=top_k)
        added = [
            model.losses(p.tokens, p.count, SelectiveAttention(own, len(p.tokens), p.count))
            .mean()
            .item()
            - before
            for p, before in zip(passages, full, strict=True)
        ]
        for kind in dict.fromkeys(p.kind for p in passages):
            which = [i for i, p in enumerate(passages) if p.kind == kind]
            differences = [added[i] for i in which]
            mean, low, high = mean_interval(differences)
            loss = sum(full[i] for i in which) / len(which)
            yield BudgetCost(top_k, kind, len(which), loss, mean, low, high)


def smallest_budget(costs: Sequence[BudgetCost], max_added: float) -> int | None:
    """The smallest `top_k` that adds no more than `max_added` nats a token on any kind of passage.

    A budget counts only if all larger ones do as well: one lucky one is no reason. None if there is none.
    """
    chosen = None
    for top_k in sorted({cost.top_k for cost in costs}, reverse=True):
        if any(cost.added > max_added for cost in costs if cost.top_k == top_k):
            break
        chosen = top_k
    return chosen
