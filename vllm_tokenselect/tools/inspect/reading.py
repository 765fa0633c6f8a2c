"""Read passages under several settings, and what begins alike only once.

The end of a passage is predicted token by token as a server would: the prompt selects in every layer, and
then each token is read as if it had been generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.inspect.model import Attention, DiagnosedModel
from vllm_tokenselect.tools.inspect.selections import Chunk, chunks_of
from vllm_tokenselect.tools.inspect.selective import SelectiveAttention
from vllm_tokenselect.tools.inspect.sharing import SharedMass

SINGLES = 16  # tokens of a passage that the matrix is taken of


@dataclass(frozen=True)
class Passage:
    """Tokens, of which the model predicts the last `count`; `kind` is the passage's name in the report."""

    kind: str
    tokens: list[int]
    count: int

    @property
    def prompt_len(self) -> int:
        return len(self.tokens) - self.count


def read_in_full(
    model: DiagnosedModel, passages: Sequence[Passage], method: Method, mass: SharedMass
) -> list[float]:
    """Mean loss of each passage with full attention; `mass` measures `SINGLES` tokens at its end."""
    losses = []
    for group in alike(passages, method):
        cache = None
        for passage in group:
            chunks = chunks_of(method, len(passage.tokens), passage.prompt_len)
            singles = [
                chunk
                for chunk in chunks
                if chunk.candidates is not None and chunk.end - chunk.start == 1
            ]
            if cache is None:
                shared = shared_tokens(group, method)
                mass.measure(())
                cache = model.read(passage.tokens[:shared], mass) if shared else None
            mass.measure(singles[:: -max(len(singles) // SINGLES, 1)][:SINGLES])
            found = model.losses(passage.tokens, passage.count, mass, cache)
            losses.append(found.mean().item())
    return losses


def read_selecting(
    model: DiagnosedModel, passages: Sequence[Passage], methods: Sequence[Method]
) -> Iterator[list[float]]:
    """Yield the mean losses of each passage under every method.

    Args:
        methods: which treat prompts alike: they differ in `anchor_layers` and `min_context` alone.
    """
    for group in alike(passages, methods[0]):
        shared = shared_tokens(group, methods[0])
        beginning: Any = None
        for passage in group:
            attention = _attention(methods[0], passage)
            if beginning is None and shared:
                beginning = model.read(passage.tokens[:shared], attention)
            # The last chunk of the prompt predicts the first token.
            last = prompts_last(
                chunks_of(methods[0], len(passage.tokens), passage.prompt_len), passage
            )
            prompt = beginning
            if last > shared:
                prompt = model.read(passage.tokens[:last], attention, beginning)
            yield [
                model.losses(passage.tokens, passage.count, _attention(method, passage), prompt)
                .mean()
                .item()
                for method in methods
            ]


def alike(passages: Sequence[Passage], method: Method) -> list[list[Passage]]:
    """The passages in their order, in groups of neighbors that begin with the same chunks."""
    groups: list[list[Passage]] = []
    for passage in passages:
        if groups and shared_tokens([groups[-1][0], passage], method):
            groups[-1].append(passage)
        else:
            groups.append([passage])
    return groups


def shared_tokens(group: Sequence[Passage], method: Method) -> int:
    """How many tokens passages begin with alike, in whole chunks before the tails of their prompts."""
    ends = [method.shareable_tokens(passage.prompt_len) for passage in group]
    columns = zip(*(p.tokens[:end] for p, end in zip(group, ends, strict=True)), strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return same // method.query_chunk * method.query_chunk


def prompts_last(chunks: Sequence[Chunk], passage: Passage) -> int:
    """Position where the last chunk of a passage's prompt starts."""
    return max(chunk.start for chunk in chunks if chunk.start < passage.prompt_len)


def _attention(method: Method, passage: Passage) -> Attention:
    return SelectiveAttention(method, chunks_of(method, len(passage.tokens), passage.prompt_len))
