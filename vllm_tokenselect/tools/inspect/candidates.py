"""Settings to try, what they cost and what they lose, and the cheapest that lose little enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from vllm_tokenselect.method.anchors import choose_anchors
from vllm_tokenselect.method.settings import AnchorLayers, Method
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.inspect.model import DiagnosedModel
from vllm_tokenselect.tools.inspect.reading import Passage, read_selecting
from vllm_tokenselect.tools.inspect.sharing import Float64, propose_anchors

SHARES = (2, 3, 4, 6)  # one layer in so many is an anchor
ALL, GIVEN = "all", "as given"


@dataclass(frozen=True)
class Candidate:
    """Settings to try.

    Attributes:
        choice: where the anchors come from; the same for all budgets.
        reads: tokens that a generated token reads per layer, keys and values; see `tokens_read`.
    """

    method: Method
    choice: str
    reads: float


@dataclass(frozen=True)
class SettingsCost:
    """What a candidate loses on one kind of passage.

    Attributes:
        loss: mean negative log-likelihood a token with full attention, nats.
        added: what the method adds to it, mean over passages.
        low, high: 95 % interval of `added`; None for a single passage.
        passages: how many.
        tokens: that were predicted, of all passages.
        longest: tokens of the longest passage.
    """

    candidate: Candidate
    kind: str
    loss: float
    added: float
    low: float | None
    high: float | None
    passages: int
    tokens: int
    longest: int


def make_candidates(
    methods: Sequence[Method],
    layers: Sequence[int],
    matrices: Mapping[str, Float64],
    context: int,
) -> list[Candidate]:
    """Each of `methods` with all layers selecting, with its own anchors, and with the proposed ones.

    Args:
        methods: settings of budget and dense layers.
        layers: those that select with the fewest dense layers of `methods`.
        matrices: what these layers keep for each other, by name, as `SharedMass` gives it.
        context: tokens of the context to be fast at.
    """
    found = []
    fewest = min(method.dense_layers for method in methods)
    for method in methods:
        dense = sum(layer < method.dense_layers for layer in layers)
        selecting = layers[dense:]
        if not selecting:
            continue
        choices: dict[str, AnchorLayers] = {ALL: "all"}
        if method.anchor_layers != "all":
            choices[GIVEN] = method.anchor_layers
        for share in SHARES:
            count = max(round(len(selecting) / share), 1)
            for name, kept in matrices.items():
                proposed = propose_anchors(kept[dense:, dense:], count)
                layers_proposed = tuple(selecting[index] for index in proposed)
                if layers_proposed not in choices.values():
                    choices[f"1 in {share}, {name}"] = layers_proposed
        for choice, anchors in choices.items():
            tried = replace(method, anchor_layers=anchors)
            reads = tokens_read(tried, selecting, fewest + dense, context)
            found.append(Candidate(tried, choice, reads))
    return found


def tokens_read(method: Method, selecting: Sequence[int], dense: int, context: int) -> float:
    """How many tokens' keys and values a generated token reads, mean over layers.

    An anchor also scores all keys, which are half of the cache.

    Args:
        selecting: layers that select.
        dense: number of layers that attend to everything.
        context: tokens of the request.
    """
    if context <= max(method.min_context, method.attended_before):
        return float(context)
    anchors = len(choose_anchors(method.anchor_layers, selecting))
    read = dense * context + len(selecting) * method.attended_before + anchors * context / 2
    return read / (len(selecting) + dense)


def costs_of(
    model: DiagnosedModel,
    passages: Sequence[Passage],
    full: Sequence[float],
    candidates: Sequence[Candidate],
) -> Iterator[SettingsCost]:
    """Yield what each candidate loses on each kind of passage.

    Args:
        full: loss of each passage with full attention.
        candidates: those that read prompts alike stand together.
    """
    for _, alike in groupby(candidates, key=lambda c: _reading(c.method)):
        group = list(alike)
        losses = list(read_selecting(model, passages, [c.method for c in group]))
        for number, candidate in enumerate(group):
            for kind in dict.fromkeys(passage.kind for passage in passages):
                which = [index for index, p in enumerate(passages) if p.kind == kind]
                differences = [losses[index][number] - full[index] for index in which]
                yield SettingsCost(
                    candidate,
                    kind,
                    sum(full[index] for index in which) / len(which),
                    *mean_interval(differences),
                    passages=len(which),
                    tokens=sum(passages[index].count for index in which),
                    longest=max(len(passages[index].tokens) for index in which),
                )


def _reading(method: Method) -> Method:
    """What decides how a prompt is read."""
    return replace(method, anchor_layers="all", min_context=0)


def choose(costs: Sequence[SettingsCost], max_added: float) -> Candidate | None:
    """The cheapest candidate that adds no more than `max_added` nats a token on any kind of passage.

    Those with a larger `top_k`, with as many dense layers and anchors, must add no more either: one lucky
    budget is not enough. None if there is none.
    """
    good = []
    worst: dict[Candidate, float] = {}
    for cost in costs:
        worst[cost.candidate] = max(worst.get(cost.candidate, cost.added), cost.added)
    for candidate in worst:
        larger = [
            added
            for other, added in worst.items()
            if other.choice == candidate.choice
            and other.method.dense_layers == candidate.method.dense_layers
            and other.method.top_k >= candidate.method.top_k
        ]
        if max(larger) <= max_added:
            good.append(candidate)
    return min(good, key=lambda candidate: candidate.reads, default=None)
