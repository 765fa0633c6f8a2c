"""The ways of attending whose answers are compared, in a plain PyTorch forward of the method's definition.

`ours` are the package's defaults at a budget; each of the others differs in what its name says. The
question is what other ways of selecting would do, so some score and vote here; the served one is
`tools/inspect`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_tokenselect.kernels.vote.reference import soft_vote
from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.inspect.model import Attention
from vllm_tokenselect.tools.inspect.selections import (
    Chunk,
    Select,
    best,
    by_attention,
    by_distance,
    by_vote,
    chunks_of,
    scores,
)
from vllm_tokenselect.tools.inspect.selective import SelectiveAttention

FULL = "full"
# Dense layers, and anchors: every so many layers, or these.
_LAYERS = re.compile(r"(?:dense (?P<dense>\d+))?(?:^| |$)(?:anchors (?P<anchors>\d+(?: \d+)*))?")


@dataclass(frozen=True)
class Way:
    """A way of attending.

    Attributes:
        method: the settings; None for full attention.
        selecting: makes of the text's number what selects for its chunks.
    """

    name: str
    method: Method | None = None
    selecting: Callable[[int], Select] = lambda number: by_vote

    def attention(self, num_tokens: int, num_generated: int, number: int) -> Attention | None:
        """Attention over a sequence of which the last `num_generated` tokens are read as if generated."""
        if self.method is None:
            return None
        chunks = chunks_of(self.method, num_tokens, num_tokens - num_generated)
        return SelectiveAttention(self.method, chunks, self.selecting(number))


def split(budget: int) -> Method:
    """The defaults, but for attending to `budget` tokens before a chunk.

    A thirty-second of them is sink and a quarter local; the others are selected.
    """
    n_init, n_local = budget // 32, budget // 4
    return Method(n_init=n_init, n_local=n_local, top_k=budget - n_init - n_local)


def ways(budgets: Iterable[int]) -> dict[str, Way]:
    """Every way by its name: full attention, and at each budget `BUDGET NAME`."""
    found = [Way(FULL)]
    for budget in budgets:
        found += [replace(way, name=f"{budget} {way.name}") for way in _at(split(budget))]
    return {way.name: way for way in found}


def find_way(name: str, budget: int) -> Way:
    """A way by its name without the budget, also one that is named by its layers.

    `dense 2` lets the first two layers attend to everything; with `anchors 4` one layer in four selects
    for generated tokens, with `anchors 2 6 14 17 21` these do; `dense 2 anchors 4` is both.

    Raises:
        KeyError: when there is none.
    """
    full_name, ours = f"{budget} {name}", split(budget)
    if name == FULL:
        return Way(FULL)
    if name and (layers := _LAYERS.fullmatch(name)):
        anchors = [int(number) for number in (layers["anchors"] or "1").split()]
        settings = replace(
            ours,
            dense_layers=int(layers["dense"] or 0),
            anchor_layers=anchors[0] if len(anchors) == 1 else tuple(anchors),
        )
        return Way(full_name, settings)
    return ways([budget])[full_name]


def _at(ours: Method) -> list[Way]:
    # The paper lets the end of a prompt vote by a mean query, as the chunks before it do.
    found = [
        Way("ours", ours),
        Way("paper", replace(ours, tail_queries=0)),
        Way("sink+local", ours, _always(by_distance)),
        Way("random", ours, _at_random),
        Way("oracle", ours, _always(by_attention)),
        Way("loudest head", ours, _always(_voted(lambda logits: logits.softmax(-1).amax(-2)))),
        Way("smoothed 3", ours, _always(_voted(_smoothed(3)))),
        Way("means 4", ours, _always(_voted(soft_vote, 4))),
        Way("dense 1 oracle", replace(ours, dense_layers=1), _always(by_attention)),
    ]
    found += [Way(f"tail {n}", replace(ours, tail_queries=n)) for n in (32, 128, 384)]
    return found


Votes = Callable[[torch.Tensor], torch.Tensor]
"""From logits fp32 [n, Hq, N] of candidates to votes [n, N]."""


def _voted(votes: Votes, parts: int = 1) -> Select:
    """A chunk votes by the means of so many equal parts of it, if it has as many queries."""

    def select(
        chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> torch.Tensor:
        assert chunk.candidates is not None
        first, stop = chunk.candidates.start, chunk.candidates.stop
        means = [part.mean(dim=1, dtype=torch.float32) for part in queries.chunk(parts, dim=1)]
        logits = scores(torch.stack(means, dim=1), keys[:, first:stop], scale).transpose(0, 1)
        return best(votes(logits).sum(0), chunk.top_k) + first

    return select


def _smoothed(width: int) -> Votes:
    """Each candidate gets the most votes that any of `width` neighbors has, itself in their middle."""
    return lambda logits: F.max_pool1d(soft_vote(logits), width, stride=1, padding=width // 2)


def _always(select: Select) -> Callable[[int], Select]:
    return lambda number: select


def _at_random(number: int) -> Select:
    """Any candidates, drawn anew for every chunk in every layer."""
    generator = torch.Generator().manual_seed(number)

    def select(
        chunk: Chunk, queries: torch.Tensor, keys: torch.Tensor, scale: float
    ) -> torch.Tensor:
        assert chunk.candidates is not None
        chosen = torch.randperm(len(chunk.candidates), generator=generator)[: chunk.top_k]
        return chosen.sort().values + chunk.candidates.start

    return select
