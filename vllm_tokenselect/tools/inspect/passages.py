"""Passages that a model reads: the user's own prompts, or real text with and without hidden numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_tokenselect.tools.common.hidden import needle_prompts
from vllm_tokenselect.tools.common.text import document, encode, prefix
from vllm_tokenselect.tools.inspect.reading import Passage

NEEDLES, TEXT, OWN = "needles", "text", "your prompts"
TEXT_COUNT = 128  # tokens of a text that are predicted
NEEDLES_PER_TEXT = 8


class TooShort(ValueError):
    """A prompt has too few tokens. The message names it."""


def built_in_passages(tokenizer: Any, length: int, samples: int, seed: int) -> list[Passage]:
    """`samples` questions about numbers in real text, and a quarter as many texts, of `length` tokens."""
    found = needle_passages(tokenizer, length, samples, seed)
    for number in range(max(samples // 4, 2)):
        tokens = [*prefix(tokenizer), *document(tokenizer, seed + number, length)][:length]
        found.append(Passage(TEXT, tokens, TEXT_COUNT))
    return found


def needle_passages(tokenizer: Any, length: int, samples: int, seed: int) -> list[Passage]:
    """`samples` questions about numbers in real text, with answers to predict."""
    found = []
    for number in range(-(-samples // NEEDLES_PER_TEXT)):
        for prompt in needle_prompts(tokenizer, length, seed + number, NEEDLES_PER_TEXT):
            answer = encode(tokenizer, prompt.expected)
            found.append(Passage(NEEDLES, [*prompt.tokens, *answer], len(answer)))
    return found[:samples]


def own_passages(tokenizer: Any, files: list[Path], count: int) -> list[Passage]:
    """Passages of text files; the model predicts the last `count` tokens of each.

    Raises:
        TooShort: when a file has no more tokens than that.
    """
    found = []
    for file in files:
        tokens = tokenizer(file.read_text())["input_ids"]
        if len(tokens) <= count:
            raise TooShort(f"{file} has {len(tokens)} tokens, too few to predict {count} of them")
        found.append(Passage(OWN, tokens, count))
    return found
