"""Prompts with something hidden in them, of exactly the length asked for, and long real text.

Everything is seeded, and tokenised in pieces that never merge: so a prompt's length is exact, what is
hidden stands where it is said to, and prompts that are meant to share a beginning do.

Questions begin the answer up to the space before its digits: whether the number is found is measured, not
whether a small model cares to say one. They were worded, on other prompts of 2,000 tokens, so that
SmolLM2-135M finds it with full attention.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any

# The passkey task of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718), its noise and its words.
PASSKEY_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
PASSKEY_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
PASSKEY = "The pass key is {code}. Remember it. {code} is the pass key.\n"
PASSKEY_QUESTION = "\n\nWhat is the pass key?"
PASSKEY_ANSWER = "As written above: The pass key is "

NEEDLE_INTRODUCTION = "Read this text.\n\n"
NEEDLE = "{fact} {code}.\n\n"
NEEDLE_QUESTION = "\n\nWhat was the number?"
FACTS = (
    "The door of the lighthouse opens with the number",
    "The telephone number of the baker is",
    "The old violin was sold at auction for",
    "The ferry to the island carries the registration",
    "The library card of Ingrid has the number",
    "The chapel on the hill was built from",
    "The sealed envelope holds a cheque for",
    "The shelf mark of the stolen map is",
    "The mountain railway has a length of",
    "The museum of clocks counted last year",
    "The winning lottery ticket was number",
    "The heaviest parcel of the day weighed",
)

CODE_DIGITS = 5
ANSWER_TOKENS = CODE_DIGITS + 1  # the digits, each a token, and what ends them
_TEXT = "(text)"


@dataclass(frozen=True)
class HiddenPrompt:
    """A prompt of tokens, the digits that must be said next, and the index where they were hidden.

    `position` is that of the first token of the sentence with the digits.
    """

    tokens: list[int]
    expected: str
    position: int

    @property
    def depth(self) -> float:
        """Where the sentence stands, as a share of the prompt."""
        return self.position / len(self.tokens)


def is_right(said: str, expected: str) -> bool:
    """Whether the first number that was said is the expected one, all of it and nothing more."""
    numbers = re.findall(r"\d+", said)
    return bool(numbers) and numbers[0] == expected


def passkey_prompt(tokenizer: Any, length: int, depth: float, seed: int) -> HiddenPrompt:
    """A passkey at `depth` (0 to 1) of noise that is the same in every prompt.

    Prompts of one length, whatever their seed, share all that stands before the less deep key.
    """
    code = _code(random.Random(f"passkey {length} {depth} {seed}"))
    head, tail = _chat(tokenizer, PASSKEY_INTRODUCTION, PASSKEY_QUESTION, PASSKEY_ANSWER)
    noise = _encode(tokenizer, PASSKEY_NOISE)
    key = _encode(tokenizer, PASSKEY.format(code=code))
    size = length - len(head) - len(key) - len(tail)
    if size < 0:
        raise ValueError(f"{length} tokens cannot hold the question and the key")
    before = round(depth * size / len(noise)) * len(noise)
    before = min(before, size // len(noise) * len(noise))  # a key never cuts a sentence
    text = noise * (size // len(noise) + 1)
    tokens = [*head, *text[:before], *key, *text[: size - before], *tail]
    return HiddenPrompt(tokens, code, len(head) + before)


def needle_prompts(
    tokenizer: Any, length: int, seed: int, num_needles: int = 8
) -> list[HiddenPrompt]:
    """One haystack of real text with several needles, and a prompt that asks for each of them.

    The needles stand in different shares of the text, one in each, at the start of a paragraph. The
    prompts share the haystack and are each of `length` tokens: one whose question is shorter than the
    others' has a few tokens more of the text.
    """
    rng = random.Random(f"needles {length} {seed} {num_needles}")
    facts = rng.sample(FACTS, num_needles)
    codes = [_code(rng) for _ in facts]
    ends = [_chat(tokenizer, NEEDLE_INTRODUCTION, NEEDLE_QUESTION, f"{fact} ") for fact in facts]
    head = ends[0][0]
    needles = [
        _encode(tokenizer, NEEDLE.format(fact=fact, code=code))
        for fact, code in zip(facts, codes, strict=True)
    ]
    size = length - len(head) - sum(map(len, needles))
    text_size = size - max(len(tail) for _, tail in ends)
    if text_size < num_needles:
        raise ValueError(f"{length} tokens cannot hold {num_needles} needles and a question")
    text, starts = _text_tokens(tokenizer, rng, size)
    body, positions = _hide(rng, text, [start for start in starts if start <= text_size], needles)
    return [
        HiddenPrompt([*head, *body[: length - len(head) - len(tail)], *tail], code, len(head) + at)
        for (_, tail), code, at in zip(ends, codes, positions, strict=True)
    ]


def _hide(
    rng: random.Random, text: list[int], starts: list[int], needles: list[list[int]]
) -> tuple[list[int], list[int]]:
    """The text with the needles at some of the starts of its paragraphs, and where each of them is."""
    body: list[int] = []
    positions = []
    taken = 0
    for index, needle in enumerate(needles):
        aimed = (index + rng.random()) / len(needles) * starts[-1]
        start = max(taken, min(starts, key=lambda start: abs(start - aimed)))
        body += text[taken:start]
        positions.append(len(body))
        body += needle
        taken = start
    return body + text[taken:], positions


def document(tokenizer: Any, seed: int, length: int) -> list[int]:
    """The first `length` tokens of a text that says nothing twice, its chapters in an order by `seed`."""
    tokens, _ = _text_tokens(tokenizer, random.Random(f"document {seed}"), length)
    return tokens


def _code(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (CODE_DIGITS - 1), 10**CODE_DIGITS))


def _chat(
    tokenizer: Any, introduction: str, question: str, answer: str
) -> tuple[list[int], list[int]]:
    """What stands before and after the text in a user's message, and the answer as it begins."""
    message = [{"role": "user", "content": introduction + _TEXT + question}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, after = chat.split(_TEXT)
    return _encode(tokenizer, before), _encode(tokenizer, after + answer)


def _text_tokens(tokenizer: Any, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Real text of exactly `length` tokens, and the indices where its paragraphs start."""
    tokens: list[int] = []
    starts = []
    for paragraph in _paragraphs(rng):
        starts.append(len(tokens))
        tokens += _paragraph_tokens(tokenizer, paragraph)
        if len(tokens) >= length:
            return tokens[:length], starts
    raise ValueError(f"the text has only {len(tokens):,} tokens, not {length:,}")


def _paragraphs(rng: random.Random) -> Iterator[str]:
    """Paragraphs of the Python documentation, which comes with Python, its chapters in random order.

    Chapters quote each other. A paragraph that was there before is left out: what can be copied word by
    word would reward looking back more than text does.
    """
    chapters = sorted(set(topics.values()))
    rng.shuffle(chapters)
    seen: set[str] = set()
    for chapter in chapters:
        for paragraph in chapter.split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                yield paragraph + "\n\n"


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


@cache
def _paragraph_tokens(tokenizer: Any, paragraph: str) -> tuple[int, ...]:
    return tuple(_encode(tokenizer, paragraph))
