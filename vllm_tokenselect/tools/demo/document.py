"""The demo's document: a ship's log with facts all over it.

Generated, so that no model has seen it, and from a fixed seed, so that every demo asks the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


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


# In the document's order.
_STANDING = (
    Fact("What is the code of the lighthouse door?", "The code of the lighthouse door is", "4817"),
    Fact(
        "What is the number of the captain's cabin?", "The number of the captain's cabin is", "392"
    ),
    Fact("What is the ship's dog called?", "The ship's dog is called", "Biscuit"),
    Fact(
        "What was the price of the new anchor?",
        "The price of the new anchor was",
        "6258",
        " crowns.",
    ),
    Fact("What is the name of the pilot?", "The name of the pilot is", "Fernando"),
    Fact("What is the depth of the harbor?", "The depth of the harbor is", "73", " fathoms."),
    Fact("Where is the treasure buried?", "The treasure is buried under", "the old windmill"),
    Fact(
        "What is the password of the radio room?", "The password of the radio room is", "marigold"
    ),
    Fact(
        "What is the weight of the great bell?",
        "The weight of the great bell is",
        "9140",
        " pounds.",
    ),
    Fact("What is the doctor's birthplace?", "The doctor's birthplace is", "Lisbon"),
    Fact("What is the number of the bank account?", "The number of the bank account is", "50736"),
    Fact("What is the color of the signal flag?", "The color of the signal flag is", "violet"),
    Fact(
        "What is the name of the ship's owner?", "The name of the ship's owner is", "Margaret Hale"
    ),
    Fact(
        "What is the length of the anchor chain?",
        "The length of the anchor chain is",
        "815",
        " feet.",
    ),
    Fact("What is the combination of the safe?", "The combination of the safe is", "2069"),
    Fact("What is the parrot's age?", "The parrot's age is", "64", " years."),
)
# Those that SmolLM2 is sure of with full attention, by at least one nat at every token
# (`test_demo_facts.py`), and that stand outside of the last tokens, which every query attends to.
FACTS = tuple(_STANDING[number] for number in (0, 3, 5, 7, 8, 11, 12, 14))

_ENTRIES = 75
_SEED = 7

_WINDS = ("south-west", "north-east", "west", "north", "south-east", "east by north")
_SEAS = ("a long low swell", "a short choppy sea", "hardly a ripple", "heavy green water on deck")
_SKIES = ("clear and cold", "grey with low cloud", "hazy at noon", "bright after the rain")
_PEOPLE = (
    "the cook",
    "the second mate",
    "the carpenter",
    "young Tobias",
    "the sailmaker",
    "Ingrid",
)
_PLACES = (
    "Cape Morrow",
    "the Sanders bank",
    "Gull Island",
    "the Narrows",
    "Port Ellery",
    "Farrow Bay",
)
_GOODS = (
    "salted cod",
    "rope and canvas",
    "lamp oil",
    "barrels of apples",
    "roof slates",
    "pine planks",
)
_SIGHTS = (
    "a pod of dolphins that kept us company until dusk",
    "two fishing boats with their nets out",
    "an old buoy torn loose by the storm",
    "smoke on the horizon, which later proved to be a steamer",
    "a great flock of terns over a shoal of herring",
    "the wreck of a barge, half sunk in the sand",
)
_WORK = (
    "mended the foresail, which had split along its old seam",
    "scrubbed the lower deck with sand and vinegar",
    "counted the stores and found one barrel short",
    "greased the blocks and spliced a new halyard",
    "painted the rail on the weather side",
    "repaired the pump, whose leather had worn through",
)
_EVENINGS = (
    "In the evening there was music in the forecastle and nobody went early to bed.",
    "Supper was late and not very good, but the bread was fresh.",
    "At night the stars were so plain that we could check our reckoning by them.",
    "Toward midnight the fog came down and we rang the bell every five minutes.",
    "The watch was quiet, and I used the hours to write letters home.",
    "We argued about the best way to cook beans until the lamp burned low.",
)


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
    sentences = [
        f"Day {day}. Wind {rng.choice(_WINDS)}, {rng.choice(_SEAS)}, the sky {rng.choice(_SKIES)}.",
        f"We passed {rng.choice(_PLACES)} and saw {rng.choice(_SIGHTS)}.",
        f"During the day {rng.choice(_PEOPLE)} {rng.choice(_WORK)}.",
        f"We took on {rng.randint(3, 60)} loads of {rng.choice(_GOODS)} for {rng.choice(_PLACES)}.",
        rng.choice(_EVENINGS),
    ]
    return " ".join(sentences)
