"""Models of many families say the same whether they rotate queries and keys or the layers do it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models.zoo import REFUSED, SERVED, TRAINED, save

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


def on_tokenselect(**settings: Any) -> dict[str, Any]:
    return {
        "attention_backend": "TOKENSELECT",
        "additional_config": {"tokenselect": {**SETTINGS, **settings}},
    }


def serve(folder: Path, *ways: dict[str, Any]) -> list[Any]:
    """Answers, or errors, of a model served in several ways."""
    command = [sys.executable, "-m", "tests.models.serve", str(folder), json.dumps(ways)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]
    assert len(lines) == len(ways), done.stdout[-3000:] + done.stderr[-3000:]
    return lines


def assert_same(answers: list[Any], expected: list[Any]) -> None:
    for (tokens, logprob), (wanted, wanted_logprob) in zip(answers, expected, strict=True):
        assert tokens == wanted
        assert logprob == pytest.approx(wanted_logprob, abs=2e-3)


@pytest.mark.parametrize("name", SERVED)
def test_with_a_budget_that_covers_the_context_it_is_full_attention(name, tmp_path):
    folder = save(tmp_path / "model", *SERVED[name])
    full, reassigned = serve(folder, FULL, on_tokenselect())
    assert_same(reassigned, full)
    assert len({tuple(tokens) for tokens, _ in full}) == len(full), "prompts should matter"


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_rotation_cannot_be_taken_over_is_refused_by_name(name, tmp_path):
    family, options, reason = REFUSED[name]
    [refused] = serve(save(tmp_path / "model", family, options), on_tokenselect())
    assert f"positions='reassigned' cannot serve {family}ForCausalLM: " in refused["error"]
    assert reason in refused["error"]


def test_layers_that_keep_their_rotation_have_positions_to_the_end(tmp_path):
    """Sliding-window layers read past their table as with one that was made long enough."""
    folder = save(tmp_path / "model", *SERVED["Gemma 3, with sliding windows"])
    beyond = {**on_tokenselect(top_k=40), "max_model_len": 3 * TRAINED, "lengths": [1300, 900]}
    longer_table = {"hf_overrides": {"max_position_embeddings": 4 * TRAINED}}
    extended, long = serve(folder, beyond, {**beyond, **longer_table})
    assert_same(extended, long)
