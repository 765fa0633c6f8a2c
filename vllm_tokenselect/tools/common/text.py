"""Long real text in tokens, and the words before and after a task's text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

_TEXT = "(text)"


def document(
    tokenizer: Any, seed: int, length: int, chapters: tuple[str, ...] | None = None
) -> list[int]:
    """The first `length` tokens of real text; `seed` orders its chapters, and no paragraph comes twice."""
    tokens, _ = text_tokens(tokenizer, random.Random(f"document {seed}"), length, chapters)
    return tokens


def text_tokens(
    tokenizer: Any, rng: random.Random, length: int, chapters: tuple[str, ...] | None = None
) -> tuple[list[int], list[int]]:
    """Real text of exactly `length` tokens, and the indices where its paragraphs start.

    Args:
        chapters: of the text; None takes the Python documentation, which comes with Python.

    Raises:
        ValueError: when the text is shorter.
    """
    tokens: list[int] = []
    starts = []
    for paragraph in _paragraphs(rng, chapters or python_documentation()):
        starts.append(len(tokens))
        tokens += _paragraph_tokens(tokenizer, paragraph)
        if len(tokens) >= length:
            return tokens[:length], starts
    raise ValueError(f"the text has only {len(tokens):,} tokens, not {length:,}")


def python_documentation() -> tuple[str, ...]:
    """The chapters of `pydoc_data.topics`."""
    return tuple(sorted(set(topics.values())))


def chapters_of(file: Path, paragraphs: int = 20) -> tuple[str, ...]:
    """A text file in chapters of `paragraphs` paragraphs each; a blank line ends a paragraph."""
    found = [part for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    starts = range(0, len(found), paragraphs)
    return tuple("\n\n".join(found[start : start + paragraphs]) for start in starts)


def _paragraphs(rng: random.Random, chapters: tuple[str, ...]) -> Iterator[str]:
    """Paragraphs of the chapters in random order.

    Chapters quote each other. A paragraph that came before is left out, because text that can be copied
    word by word would reward looking back more than other text does.
    """
    shuffled = list(chapters)
    rng.shuffle(shuffled)
    seen: set[str] = set()
    for chapter in shuffled:
        for paragraph in chapter.split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                yield paragraph + "\n\n"


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without the special tokens that a tokenizer adds by itself."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text, such as the one of its beginning."""
    alone = encode(tokenizer, "a")
    tokens: list[int] = tokenizer.encode("a", add_special_tokens=True)
    starts = range(len(tokens) - len(alone) + 1)
    return tokens[: next(start for start in starts if tokens[start:][: len(alone)] == alone)]


def around(
    tokenizer: Any, introduction: str, question: str, answer: str
) -> tuple[list[int], list[int]]:
    """Tokens before and after a task's text; the beginning of the answer is the end of the second.

    They follow the model's chat template, if it has one. Otherwise they are plain text.
    """
    if tokenizer.chat_template is None:
        before = [*prefix(tokenizer), *encode(tokenizer, introduction)]
        return before, encode(tokenizer, f"{question}\n\n{answer}")
    message = [{"role": "user", "content": introduction + _TEXT + question}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    start, end = chat.split(_TEXT)
    return encode(tokenizer, start), encode(tokenizer, end + answer)


@cache
def _paragraph_tokens(tokenizer: Any, paragraph: str) -> tuple[int, ...]:
    return tuple(encode(tokenizer, paragraph))
