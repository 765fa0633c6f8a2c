"""Prompts with something hidden in them, of exactly the length asked for.

Everything is seeded. A prompt is put together from pieces that are tokenized by themselves, so its length
and the place of what is hidden are exact, and prompts that should share a beginning do.

Each prompt begins the answer, up to the space before its digits: the tasks measure whether the number is
found, and not whether a small model answers with a number at all. The wording was chosen on other prompts
of 2,000 tokens so that SmolLM2-135M finds the number with full attention.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from vllm_tokenselect.tools.common.text import around, encode, text_tokens

# The tasks Retrieve.PassKey and Retrieve.Number of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718),
# their noise and their words.
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
NUMBER = "The sequence of digits is {code}. Remember it. {code} is the sequence of digits.\n"
NUMBER_QUESTION = "\n\nWhat is the sequence of digits?"
NUMBER_ANSWER = "As written above: The sequence of digits is "

NEEDLE = "{fact} {code}.\n\n"
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
NUMBER_DIGITS = 10


@dataclass(frozen=True)
class Wording:
    """How a needle is asked for; `{fact}` is its sentence without the number.

    Attributes:
        introduction: before the text. If it tells the fact, prompts about one text share no beginning.
        question: behind the text.
        answer: as the prompt begins it.
    """

    introduction: str
    question: str
    answer: str


ASKED_AT_THE_END = Wording("Read this text.\n\n", "\n\nWhat was the number?", "{fact} ")


@dataclass(frozen=True)
class HiddenPrompt:
    """A prompt of tokens, the digits that must be said next, and the index where they were hidden.

    `position` is that of the first token of the sentence with the digits; `begun` is how the prompt
    begins the answer.
    """

    tokens: list[int]
    expected: str
    position: int
    begun: str = ""

    @property
    def depth(self) -> float:
        """Where the sentence stands, as a share of the prompt."""
        return self.position / len(self.tokens)


def is_right(said: str, expected: str) -> bool:
    """Whether the first number that was said is the expected one, all of it and nothing more."""
    numbers = re.findall(r"\d+", said)
    return bool(numbers) and numbers[0] == expected


def passkey_prompt(tokenizer: Any, length: int, depth: float, seed: int) -> HiddenPrompt:
    """A passkey of five digits at `depth` (0 to 1) of noise that is the same in every prompt.

    Prompts of one length, whatever their seed, share all that stands before the less deep key.
    """
    code = _code(random.Random(f"passkey {length} {depth} {seed}"))
    question = (PASSKEY_QUESTION, PASSKEY_ANSWER)
    return _in_noise(tokenizer, length, depth, code, PASSKEY, question)


def number_string_prompt(tokenizer: Any, length: int, depth: float, seed: int) -> HiddenPrompt:
    """Ten digits of which many repeat their neighbor, hidden as a passkey is."""
    code = _repeating_code(random.Random(f"number string {length} {depth} {seed}"))
    question = (NUMBER_QUESTION, NUMBER_ANSWER)
    return _in_noise(tokenizer, length, depth, code, NUMBER, question)


def _in_noise(
    tokenizer: Any, length: int, depth: float, code: str, sentence: str, question: tuple[str, str]
) -> HiddenPrompt:
    head, tail = around(tokenizer, PASSKEY_INTRODUCTION, *question)
    noise = encode(tokenizer, PASSKEY_NOISE)
    key = encode(tokenizer, sentence.format(code=code))
    size = length - len(head) - len(key) - len(tail)
    if size < 0:
        raise ValueError(f"{length} tokens cannot hold the question and the key")
    before = round(depth * size / len(noise)) * len(noise)
    before = min(before, size // len(noise) * len(noise))  # a key never cuts a sentence
    text = noise * (size // len(noise) + 1)
    tokens = [*head, *text[:before], *key, *text[: size - before], *tail]
    return HiddenPrompt(tokens, code, len(head) + before, question[1])


def needle_prompts(
    tokenizer: Any,
    length: int,
    seed: int,
    num_needles: int = 8,
    wording: Wording = ASKED_AT_THE_END,
) -> list[HiddenPrompt]:
    """One haystack of real text with several needles, and a prompt that asks for each of them.

    The needles stand in different shares of the text, one in each, at the start of a paragraph. The
    prompts share the haystack and are each of `length` tokens: one whose question is shorter than the
    others' has a few tokens more of the text.
    """
    rng = random.Random(f"needles {length} {seed} {num_needles}")
    facts = rng.sample(FACTS, num_needles)
    codes = [_code(rng) for _ in facts]
    needles = [
        encode(tokenizer, NEEDLE.format(fact=fact, code=code))
        for fact, code in zip(facts, codes, strict=True)
    ]
    asked = [
        [
            part.format(fact=fact)
            for part in (wording.introduction, wording.question, wording.answer)
        ]
        for fact in facts
    ]
    ends = [around(tokenizer, *parts) for parts in asked]
    size = length - min(len(head) for head, _ in ends) - sum(map(len, needles))
    text_size = length - max(len(head) + len(tail) for head, tail in ends) - sum(map(len, needles))
    if text_size < num_needles:
        raise ValueError(f"{length} tokens cannot hold {num_needles} needles and a question")
    text, starts = text_tokens(tokenizer, rng, size)
    body, positions = _hide(rng, text, [start for start in starts if start <= text_size], needles)
    return [
        HiddenPrompt(
            [*head, *body[: length - len(head) - len(tail)], *tail], code, len(head) + at, answer
        )
        for (head, tail), (_, _, answer), code, at in zip(
            ends, asked, codes, positions, strict=True
        )
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


def _code(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (CODE_DIGITS - 1), 10**CODE_DIGITS))


def _repeating_code(rng: random.Random) -> str:
    """Half of the digits are drawn, the others double one that is there."""
    digits = rng.choices("0123456789", k=NUMBER_DIGITS // 2)
    while len(digits) < NUMBER_DIGITS:
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)
