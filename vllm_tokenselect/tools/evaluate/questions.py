"""What is asked: settings, the cells that they make, and the question of each cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_tokenselect.tools.common.text import document, prefix
from vllm_tokenselect.tools.evaluate.cells import Cell
from vllm_tokenselect.tools.evaluate.prompts import TaskPrompt
from vllm_tokenselect.tools.evaluate.tasks import LOSSES, TASKS

SEEDS_APART = 10**6  # texts are numbered; a seed starts so many numbers after the one before


@dataclass(frozen=True)
class EvalSettings:
    """What is asked.

    Attributes:
        lengths: tokens of prompt and answer together.
        samples: prompts of each task at each length.
        texts: texts of each length that are read for perplexity.
        steps: tokens at the end of each text whose log-probabilities are asked for.
        seed: of all prompts and texts.
        depths: at which passkeys are hidden, from the start to the end.
        chapters: of the texts for perplexity; None takes the Python documentation.
        concurrency: requests at a time, for each server.
        attempts: how often to try a request.
        timeout: seconds that an attempt may take.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int = 100
    texts: int = 8
    steps: int = 128
    seed: int = 0
    depths: int = 10
    chapters: tuple[str, ...] | None = None
    concurrency: int = 4
    attempts: int = 6
    timeout: float = 600.0


@dataclass(frozen=True)
class Question:
    """A cell without its server, and what it asks: a prompt with an answer, or a text to read."""

    cell: Cell
    prompt: TaskPrompt | None = None
    text: str = ""
    read: tuple[int, ...] = ()


def cells(settings: EvalSettings) -> Iterator[Cell]:
    """Everything that is asked of a server, in an order that lets the prefix cache save work."""
    for name in settings.tasks:
        for length in sorted(settings.lengths):
            count = settings.texts if name in LOSSES else settings.samples
            numbers = range(settings.seed * SEEDS_APART, settings.seed * SEEDS_APART + count)
            found = [Cell("", name, length, number) for number in numbers]
            if name in TASKS and TASKS[name].chooses_depth:
                found = [_at_a_depth(cell, settings.depths) for cell in found]
                # What stands before the deepest is then in the cache for all that come later.
                found.sort(key=lambda cell: -(cell.depth or 0))
            yield from found


def _at_a_depth(cell: Cell, depths: int) -> Cell:
    return replace(cell, depth=round((cell.number % depths + 0.5) / depths, 4))


def question(cell: Cell, tokenizer: Any, settings: EvalSettings, *, chat: bool) -> Question:
    """What a cell asks.

    Raises:
        ValueError: when its length cannot hold it.
    """
    if cell.task in LOSSES:
        head = prefix(tokenizer)
        size = cell.length - len(head)
        return Question(
            cell, read=(*head, *document(tokenizer, cell.number, size, settings.chapters))
        )
    task = TASKS[cell.task]
    prompt = task.make(tokenizer, cell.length - task.max_tokens, cell.depth, cell.number)
    text = tokenizer.decode(prompt.tokens[len(prefix(tokenizer)) :]) if chat else ""
    return Question(cell, prompt, text)


def refuse_what_does_not_fit(tokenizer: Any, settings: EvalSettings) -> None:
    """Make one prompt of each task at the shortest length, and a text of the longest.

    Raises:
        ValueError: naming the task and the length.
    """
    for name in settings.tasks:
        length = max(settings.lengths) if name in LOSSES else min(settings.lengths)
        asked = replace(settings, tasks=(name,), lengths=(length,))
        try:
            if name in LOSSES and settings.steps >= length:
                raise ValueError(f"--steps {settings.steps} leaves nothing before them")
            question(next(cells(asked)), tokenizer, asked, chat=False)
        except ValueError as error:
            raise ValueError(f"{name} at --lengths {length}: {error}") from error
