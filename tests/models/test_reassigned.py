"""Models of many families say the same whether they rotate queries and keys or the layers do it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

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


def models(names: Iterable[str]) -> list[Any]:
    """Those that every test run serves, and with `make endurance` the others: a minute is enough."""
    return [n if n in EVERY_RUN else pytest.param(n, marks=pytest.mark.endurance) for n in names]


def reassigned(**settings: Any) -> dict[str, Any]:
    return {
        "attention_backend": "TOKENSELECT",
        "additional_config": {"tokenselect": {**SETTINGS, **settings}},
    }


# Past the trained length, with the model's own table and with one that was made long enough.
BEYOND = {**reassigned(top_k=40), "max_model_len": 3 * TRAINED, "lengths": [1300, 900]}
BEYOND_WITH_LONG_TABLE = {**BEYOND, "hf_overrides": {"max_position_embeddings": 4 * TRAINED}}

Answers = Callable[[str, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> Answers:
    """What a model says, or the error that stopped it, served in some way. One process serves all."""
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    jobs = [(name, way) for name in SERVED if name in chosen for way in (FULL, reassigned())]
    jobs += [(name, reassigned()) for name in REFUSED if name in chosen]
    jobs += [(HYBRID, BEYOND), (HYBRID, BEYOND_WITH_LONG_TABLE)]
    folder = tmp_path_factory.mktemp("models")
    zoo = {name: (family, options) for name, (family, options, _) in REFUSED.items()} | SERVED
    paths = {name: save(folder / name.replace("/", "-"), *zoo[name]) for name, _ in jobs}
    file = folder / "jobs.json"
    file.write_text(json.dumps([(str(paths[name]), way) for name, way in jobs]))
    command = [sys.executable, "-m", "tests.models.serve", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    said = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]
    assert len(said) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    return lambda name, way: said[jobs.index((name, way))]


def assert_same(said: Any, expected: Any) -> None:
    assert "error" not in said, said
    assert "error" not in expected, expected
    for (tokens, logprob), (wanted, wanted_logprob) in zip(said, expected, strict=True):
        assert tokens == wanted
        assert logprob == pytest.approx(wanted_logprob, abs=2e-3)


@pytest.mark.parametrize("name", models(SERVED))
def test_with_a_budget_that_covers_the_context_it_is_full_attention(answers, name):
    full = answers(name, FULL)
    assert_same(answers(name, reassigned()), full)
    assert len({tuple(tokens) for tokens, _ in full}) == len(full), "prompts should matter"


@pytest.mark.parametrize("name", models(REFUSED))
def test_a_model_whose_rotation_cannot_be_taken_over_is_refused_by_name(answers, name):
    *_, reason = REFUSED[name]
    said = answers(name, reassigned())
    assert (
        f"SettingsError: tokenselect positions='reassigned' cannot serve {reason}" in said["error"]
    )


def test_layers_that_keep_their_rotation_have_positions_to_the_end(answers):
    """Sliding-window layers read past their table as with one that was made long enough."""
    assert_same(answers(HYBRID, BEYOND), answers(HYBRID, BEYOND_WITH_LONG_TABLE))
