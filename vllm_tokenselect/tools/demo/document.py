"""The demo's document: a ship's log with facts all over it.

Generated, so that no model has seen it, and from a fixed seed, so that every demo asks the same.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fact:
    """A sentence of the document, and the question about it.

    Attributes:
        begun: the sentence up to its answer. The prompt begins the model's answer with it, so that the next
            words depend on the document and not on the model's manners.
        answer: what the model must say next.
        ended: the rest of the sentence.
    """

    question: str
    begun: str
    answer: str
    ended: str = "."

    @property
    def sentence(self) -> str:
        """As it stands in the document."""
        return f"{self.begun} {self.answer}{self.ended}"


_PARTS = json.loads(Path(__file__).with_name("ships_log.json").read_text(encoding="utf-8"))
_WORDS = _PARTS["words"]
_STANDING = tuple(Fact(**fact) for fact in _PARTS["facts"])  # in the document's order
# Those that SmolLM2 is sure of with full attention, by at least one nat at every token
# (`test_demo_facts.py`), and that stand outside of the last tokens, which every query attends to.
FACTS = tuple(_STANDING[number] for number in (0, 3, 5, 7, 8, 11, 12, 14))

_ENTRIES = 75
_SEED = 7


def ships_log() -> str:
    """The document: over 6,000 tokens of SmolLM2's tokenizer, each fact standing in it once."""
    rng = random.Random(_SEED)
    entries = [_entry(day, rng) for day in range(1, _ENTRIES + 1)]
    for number, fact in enumerate(_STANDING):
        entries[int((number + 0.5) / len(_STANDING) * _ENTRIES)] += f" {fact.sentence}"
    return "\n\n".join(entries)


def depth(fact: Fact) -> float:
    """Where a fact stands in the document: 0 at its start, 1 at its end."""
    log = ships_log()
    return log.index(fact.sentence) / len(log)


def prompt(fact: Fact) -> str:
    """The document, the question below it, and how the answer begins."""
    return f"The ship's log.\n\n{ships_log()}\n\nQuestion: {fact.question}\nAnswer: {fact.begun}"


def _entry(day: int, rng: random.Random) -> str:
    def one_of(kind: str) -> str:
        return str(rng.choice(_WORDS[kind]))

    sentences = [
        f"Day {day}. Wind {one_of('winds')}, {one_of('seas')}, the sky {one_of('skies')}.",
        f"We passed {one_of('places')} and saw {one_of('sights')}.",
        f"During the day {one_of('people')} {one_of('work')}.",
        f"We took on {rng.randint(3, 60)} loads of {one_of('goods')} for {one_of('places')}.",
        one_of("evenings"),
    ]
    return " ".join(sentences)
