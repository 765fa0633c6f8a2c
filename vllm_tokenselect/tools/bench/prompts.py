"""Prompts that no prefix cache has seen."""

from __future__ import annotations

from itertools import count
from typing import Any

from vllm_tokenselect.tools.common.text import document, encode, prefix

SHORTEST = 64  # tokens; a shorter prompt has no room for its own beginning
_SEEDS_APART = 10**6  # numbers of prompts from one seed to the next


class Prompts:
    """Real text in tokens. Each prompt begins differently, so that the prefix cache cannot help.

    Args:
        tokenizer: of the served model.
        seed: with the same one, the same prompts come in the same order.
        chapters: of the text; None takes the Python documentation.
    """

    def __init__(self, tokenizer: Any, seed: int, chapters: tuple[str, ...] | None = None) -> None:
        self._tokenizer, self._chapters = tokenizer, chapters
        self._numbers = count(seed * _SEEDS_APART)

    def new(self, length: int) -> list[int]:
        """A prompt of `length` tokens.

        Raises:
            ValueError: when the text is shorter.
        """
        number = next(self._numbers)
        title = encode(self._tokenizer, f"Document {number}\n\n")
        start = [*prefix(self._tokenizer), *title]
        return [*start, *document(self._tokenizer, number, length - len(start), self._chapters)]
