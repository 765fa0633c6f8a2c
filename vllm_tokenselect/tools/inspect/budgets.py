"""What each budget adds to a model's loss, and the smallest budget that is good enough.

The model reads each passage with full attention and then with selection. The loss is that of the passage's
last tokens. Each of them selects for itself, as generated tokens do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.inspect.model import DiagnosedModel
from vllm_tokenselect.tools.inspect.selections import chunks_of
from vllm_tokenselect.tools.inspect.selective import SelectiveAttention


@dataclass(frozen=True)
class Passage:
    """Tokens, of which the model predicts the last `count`; `kind` is the passage's name in the report."""

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


def budget_costs(
    model: DiagnosedModel, passages: Sequence[Passage], method: Method, budgets: Sequence[int]
) -> Iterator[BudgetCost]:
    """Yield the cost of each `top_k` of `budgets` on each kind of passage."""
    full = [model.losses(p.tokens, p.count).mean().item() for p in passages]
    for top_k in budgets:
        own = replace(method, top_k=top_k)
        added = []
        for p, before in zip(passages, full, strict=True):
            chunks = chunks_of(own, len(p.tokens), len(p.tokens) - p.count)
            losses = model.losses(p.tokens, p.count, SelectiveAttention(own, chunks))
            added.append(losses.mean().item() - before)
        for kind in dict.fromkeys(p.kind for p in passages):
            which = [i for i, p in enumerate(passages) if p.kind == kind]
            differences = [added[i] for i in which]
            mean, low, high = mean_interval(differences)
            loss = sum(full[i] for i in which) / len(which)
            yield BudgetCost(top_k, kind, len(which), loss, mean, low, high)


def smallest_budget(costs: Sequence[BudgetCost], max_added: float) -> int | None:
    """The smallest `top_k` that adds no more than `max_added` nats a token on any kind of passage.

    All larger budgets must add no more either: one lucky budget is not enough. None if there is none.
    """
    chosen = None
    for top_k in sorted({cost.top_k for cost in costs}, reverse=True):
        if any(cost.added > max_added for cost in costs if cost.top_k == top_k):
            break
        chosen = top_k
    return chosen
