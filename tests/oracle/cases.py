"""What is asked of the oracle and of the server: prompts that the settings make sparse."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.oracle.model import Selection
from tests.oracle.prompts import prompt_tokens

# Sparse from about 600 tokens on: a token attends to 16 + 368 + 128 = 512 others.
SETTINGS = Selection(
    top_k=368,
    n_init=16,
    n_local=128,
    query_chunk=256,
    tail_queries=32,
    similarity_threshold=1.0,  # no Selection Cache: every generated token selects
    refresh_interval=0,
)
# Of 24 generated tokens some reuse a selection because they resemble the one that made it, some may not,
# and none may once more than 8 tokens have left its local window.
CACHED_SETTINGS = replace(SETTINGS, similarity_threshold=0.75, refresh_interval=8)
# The first two layers attend to everything.
DENSE_LAYERS_SETTINGS = replace(CACHED_SETTINGS, dense_layers=2)
# What five layers select is attended to by all. While it generates, a request is dense up to 1,147 tokens.
ANCHOR_SETTINGS = replace(CACHED_SETTINGS, anchor_layers=(0, 3, 4, 11, 20), min_context=1147)
# Every seventh of the 28 layers that select, which `"anchor_layers": 7` says too.
DENSE_LAYERS_ANCHOR_SETTINGS = replace(DENSE_LAYERS_SETTINGS, anchor_layers=(2, 9, 16, 23))
# As many tokens are attended to, and never a position above 1,000.
REASSIGNED_SETTINGS = replace(SETTINGS, positions="reassigned")

LENGTHS = [1000 + 37 * i for i in range(12)] + [1600, 1900, 2300, 2700, 3300, 4000, 4900, 6000]
# A few tokens short of nine blocks of 128: each needs a tenth block while it generates.
CROWDED_LENGTHS = [9 * 128 - short for short in (4, 7, 10, 13, 16, 19)]
# So are these, short of 6 to 13 blocks.
CACHED_LENGTHS = [128 * blocks - 8 for blocks in range(6, 14)]
# Prompts of which no selection is reused, or not, by a hair's breadth: rounding would decide.
CACHED_SEEDS = [508, 525, 502, 503, 504, 505, 506, 515]
# The first three begin to select while they generate, at their third token or later, and then need another
# block. The others select from the first token on, but for 1,016, which never does.
ANCHOR_LENGTHS = [1138, 1141, 1144, 1272, 1016, 1400]
# Prompts of which rounding decides no selection that many layers attend to: with queries that are changed
# by some millionths the oracle says the same.
ANCHOR_SEEDS = [700, 741, 702, 703, 704, 705]
# SmolLM2 was trained on 8,192 tokens.
REASSIGNED_LENGTHS = [700, 1010, 1337, 1900, 2690, 4000, 9000, 11000]


@dataclass(frozen=True)
class Case:
    """One prompt and how many tokens are generated from it."""

    name: str
    prompt: list[int]
    max_tokens: int


def make_cases(tokenizer) -> list[Case]:
    """20 prompts of 1K to 6K tokens, 20 that each share the first half of one of them, 6 for crowding."""
    whole = [prompt_tokens(tokenizer, seed, length) for seed, length in enumerate(LENGTHS)]
    halves = [
        prompt_tokens(tokenizer, 100 + seed, length, shared=whole[seed][: length // 2])
        for seed, length in enumerate(LENGTHS)
    ]
    crowded = [
        prompt_tokens(tokenizer, 400 + seed, length) for seed, length in enumerate(CROWDED_LENGTHS)
    ]
    return [
        *(Case(f"whole-{len(prompt)}", prompt, 12) for prompt in whole),
        *(Case(f"half-{len(prompt)}", prompt, 12) for prompt in halves),
        *(Case(f"crowded-{len(prompt)}", prompt, 24) for prompt in crowded),
    ]


def make_cached_cases(tokenizer) -> list[Case]:
    """8 prompts for the settings with a Selection Cache."""
    lengths = zip(CACHED_SEEDS, CACHED_LENGTHS, strict=True)
    prompts = (prompt_tokens(tokenizer, seed, length) for seed, length in lengths)
    return [Case(f"cached-{len(prompt)}", prompt, 24) for prompt in prompts]


def make_dense_layers_cases(tokenizer) -> list[Case]:
    """3 of these prompts, for dense layers, with anchors and without, and for crowding."""
    return make_cached_cases(tokenizer)[-4:-1]


def make_anchor_cases(tokenizer) -> list[Case]:
    """6 prompts for the settings with anchors and a least context."""
    lengths = zip(ANCHOR_SEEDS, ANCHOR_LENGTHS, strict=True)
    prompts = (prompt_tokens(tokenizer, seed, length) for seed, length in lengths)
    return [Case(f"anchors-{len(prompt)}", prompt, 24) for prompt in prompts]


def make_reassigned_cases(tokenizer) -> list[Case]:
    """8 prompts for reassigned positions, two of them beyond what the model was trained on."""
    prompts = (prompt_tokens(tokenizer, 600 + s, n) for s, n in enumerate(REASSIGNED_LENGTHS))
    return [Case(f"reassigned-{len(prompt)}", prompt, 12) for prompt in prompts]
