"""The demo's document: a ship's log that nobody has read before, with one fact in its middle.

Generated, so that no model has seen it, and from a fixed seed, so that every demo asks the same.
"""

from __future__ import annotations

import random

QUESTION = "What is the code of the lighthouse door?"
ANSWER = "4817"
FACT = "The code of the lighthouse door is 4817."

_ENTRIES = 70
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
    """The document: over 6,000 tokens of SmolLM2's tokenizer, `FACT` standing in it once."""
    rng = random.Random(_SEED)
    entries = [_entry(day, rng) for day in range(1, _ENTRIES + 1)]
    entries[_ENTRIES // 2] += f" {FACT}"
    return "\n\n".join(entries)


def prompt() -> str:
    """The document with the question below it, as a user's message."""
    return f"Read this ship's log.\n\n{ships_log()}\n\n{QUESTION}"


def _entry(day: int, rng: random.Random) -> str:
    sentences = [
        f"Day {day}. Wind {rng.choice(_WINDS)}, {rng.choice(_SEAS)}, the sky {rng.choice(_SKIES)}.",
        f"We passed {rng.choice(_PLACES)} and saw {rng.choice(_SIGHTS)}.",
        f"During the day {rng.choice(_PEOPLE)} {rng.choice(_WORK)}.",
        f"We took on {rng.randint(3, 60)} loads of {rng.choice(_GOODS)} for {rng.choice(_PLACES)}.",
        rng.choice(_EVENINGS),
    ]
    return " ".join(sentences)
