"""Models of many families say the same whether they rotate queries and keys or the layers do it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.jobs import Answers, ask, assert_same, chosen_names, parametrized
from tests.models.zoo import EVERY_RUN, REFUSED, SERVED, TRAINED, save

pytestmark = pytest.mark.server

FULL = {"attention_backend": "CPU_ATTN"}
# At most 316 + 4 + 16 + 32 tokens are attended to: all of the prompts'.
SETTINGS = {
    "top_k": 316,
    "n_init": 4,
    "n_local": 16,
    "query_chunk": 32,
    "tail_queries": 3,
    "similarity_threshold": 1.0,
    "positions": "reassigned",
}
HYBRID = "Gemma 3, with sliding windows"


def reassigned(**settings: Any) -> dict[str, Any]:
    return {
        "attention_backend": "TOKENSELECT",
        "additional_config": {"tokenselect": {**SETTINGS, **settings}},
    }


# Past the trained length, with the model's own table and with one that was made long enough.
BEYOND = {**reassigned(top_k=40), "max_model_len": 3 * TRAINED, "lengths": [1300, 900]}
BEYOND_WITH_LONG_TABLE = {**BEYOND, "hf_overrides": {"max_position_embeddings": 4 * TRAINED}}


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> Answers:
    """What a model says, served in some way."""
    chosen = chosen_names(request)
    jobs = [(name, way) for name in SERVED if name in chosen for way in (FULL, reassigned())]
    jobs += [(name, reassigned()) for name in REFUSED if name in chosen]
    jobs += [(HYBRID, BEYOND), (HYBRID, BEYOND_WITH_LONG_TABLE)]
    folder = tmp_path_factory.mktemp("models")
    zoo = {name: (family, options) for name, (family, options, _) in REFUSED.items()} | SERVED
    paths = [save(folder / name.replace("/", "-"), *zoo[name]) for name, _ in jobs]
    return ask(jobs, paths, folder / "jobs.json")


@pytest.mark.parametrize("name", parametrized(SERVED, EVERY_RUN))
def test_with_a_budget_that_covers_the_context_it_is_full_attention(answers, name):
    full = answers(name, FULL)
    assert_same(answers(name, reassigned()), full)
    assert len({tuple(tokens) for tokens, _ in full}) == len(full), "prompts should matter"


@pytest.mark.parametrize("name", parametrized(REFUSED, EVERY_RUN))
def test_a_model_whose_rotation_cannot_be_taken_over_is_refused_by_name(answers, name):
    *_, reason = REFUSED[name]
    said = answers(name, reassigned())
    assert (
        f"SettingsError: tokenselect positions='reassigned' cannot serve {reason}" in said["error"]
    )


def test_layers_that_keep_their_rotation_have_positions_to_the_end(answers):
    """Sliding-window layers read past their table as with one that was made long enough."""
    assert_same(answers(HYBRID, BEYOND), answers(HYBRID, BEYOND_WITH_LONG_TABLE))
