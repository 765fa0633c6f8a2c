"""Prompts of a wanted length: varied English sentences with facts, the same on every machine."""

from __future__ import annotations

import random

PEOPLE = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Irene Jonas Katya Luis Mira Nils Olga Pavel"
PLACES = "harbour archive mill chapel market station garden tower bakery school library quarry"
THINGS = "lantern ledger compass violin barrel telescope kettle map saddle clock ladder mirror"
DOINGS = "carried repaired sold borrowed painted lost found measured hid returned weighed traded"


def story(seed: int, num_sentences: int) -> str:
    """Sentences such as `On day 12 Mira repaired the clock near the mill for 41 coins.`"""
    rng = random.Random(seed)
    return " ".join(
        f"On day {rng.randint(1, 999)} {rng.choice(PEOPLE.split())} {rng.choice(DOINGS.split())} the "
        f"{rng.choice(THINGS.split())} near the {rng.choice(PLACES.split())} for "
        f"{rng.randint(2, 99)} coins."
        for _ in range(num_sentences)
    )


def prompt_tokens(tokenizer, seed: int, length: int, shared: list[int] | None = None) -> list[int]:
    """A prompt of exactly `length` tokens that ends with a question, after `shared` if given."""
    rng = random.Random(seed)
    question = tokenizer.encode(
        f"\nQuestion: what did {rng.choice(PEOPLE.split())} do, and near which place?\nAnswer:"
    )
    start = list(shared or [])
    body = tokenizer.encode(story(seed, length // 12 + 20))
    needed = length - len(start) - len(question)
    assert 0 <= needed <= len(body)
    return [*start, *body[:needed], *question]
