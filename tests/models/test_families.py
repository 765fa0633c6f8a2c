"""Whatever family a model is of, the server selects, or says before it loads it why not; doctor knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.families import EVERY_RUN, FAMILIES, NOT_BY_VLLM, REFUSED, save_config
from tests.models.jobs import Answers, ask, assert_same, chosen_names, parametrized
from tests.models.verdicts import disagreement
from tests.models.zoo import save

pytestmark = pytest.mark.server

DOCTOR = {"ask": "doctor"}
SERVER = {"ask": "start", "attention_backend": "TOKENSELECT", "load_format": "dummy"}
# A folder without weights, which a server that refuses a model does not look for.
REFUSING = {**SERVER, "load_format": "auto"}
# vLLM makes blocks of 1,152 tokens for this hybrid model, once its weights are loaded.
HYBRID = "Qwen3-Next"
TOO_SMALL_FOR_BLOCKS = {
    **REFUSING,
    "max_num_batched_tokens": 1154,
    "max_num_seqs": 4,
    "prefix_match_unit": 64,
    "additional_config": {"tokenselect": {"query_chunk": 64}},
}
# Budgets that cover the context, so that selecting is full attention.
COVERED = {
    "attention_backend": "TOKENSELECT",
    "additional_config": {
        "tokenselect": {
            "top_k": 316,
            "n_init": 4,
            "n_local": 16,
            "query_chunk": 32,
            "min_context": 0,
        }
    },
}
SELECTING = {
    **COVERED,
    "additional_config": {
        "tokenselect": {**COVERED["additional_config"]["tokenselect"], "top_k": 32}
    },
}
FULL = {"attention_backend": "CPU_ATTN"}
CHUNKED = "Llama 4"  # in chunks of 64 tokens
SHARING = "Gemma 4 E"  # layer 3 reads the keys of layer 1, whose attention has no effect
SHARED = {**FAMILIES[SHARING][1], "tie_word_embeddings": False, "mute_layer": 1}
# With sinks or a soft cap in their attention.
SOFTMAX = ("gpt-oss", "Granite-SWA", "Gemma 2")
REASSIGNED = {
    **COVERED,
    "additional_config": {
        "tokenselect": {**COVERED["additional_config"]["tokenselect"], "positions": "reassigned"}
    },
}
# A prompt of several steps, and once more, which then begins in the prefix cache.
TWICE = {"lengths": [300, 40, 300]}


def server_of(name: str) -> dict[str, Any]:
    return REFUSING if name in REFUSED else SERVER


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Answers:
    """What became of a family, asked in some way."""
    chosen = chosen_names(request)
    names = [name for name in FAMILIES if name in chosen]
    jobs = [(name, way) for name in names for way in (DOCTOR, server_of(name))]
    jobs += [(HYBRID, TOO_SMALL_FOR_BLOCKS)]
    jobs += [(CHUNKED, way) for way in (FULL, COVERED)]
    jobs += [(SHARING, {**way, **TWICE}) for way in (FULL, COVERED, SELECTING)]
    jobs += [(name, way) for name in SOFTMAX if name in chosen for way in (FULL, COVERED)]
    jobs += [("gpt-oss", REASSIGNED)]
    folder = tmp_path_factory.mktemp("families")

    def path(name: str, way: dict[str, Any]) -> Path:
        if "ask" in way:
            return save_config(folder / name.replace("/", "-"), *FAMILIES[name])
        family, options = FAMILIES[name]
        return save(folder / f"{name} with weights", family, SHARED if name == SHARING else options)

    return ask(jobs, [path(*job) for job in jobs], folder / "jobs.json")


@pytest.mark.parametrize("name", parametrized(FAMILIES, EVERY_RUN))
def test_doctor_says_what_the_server_does(outcomes, name):
    verdict, server = outcomes(name, DOCTOR), outcomes(name, server_of(name))
    assert disagreement(verdict, server) is None


@pytest.mark.parametrize("name", parametrized(FAMILIES, EVERY_RUN))
def test_a_family_is_served_or_refused_by_the_name_of_what_is_missing(outcomes, name):
    server = outcomes(name, server_of(name))
    if name in REFUSED:
        assert "TOKENSELECT cannot serve" in server["error"]
        assert REFUSED[name] in server["error"]
        assert "AttentionSelectorConfig" not in server["error"]
    elif name in NOT_BY_VLLM:
        assert "TOKENSELECT" not in server["error"]
    else:
        assert any(runs_on == "TOKENSELECT" for _, runs_on in server["layers"])


def test_options_that_do_not_fit_the_blocks_of_a_hybrid_are_refused_before_its_weights_are_read(
    outcomes,
):
    error = outcomes(HYBRID, TOO_SMALL_FOR_BLOCKS)["error"]
    assert "max_num_batched_tokens=1154 cannot hold a KV block of 1152 tokens" in error


def test_layers_that_attend_within_their_chunk_are_left_alone(outcomes):
    full = outcomes(CHUNKED, FULL)
    assert_same(outcomes(CHUNKED, COVERED), full)
    assert len({tuple(tokens) for tokens, _ in full}) == len(full), "prompts should matter"


def test_a_layer_that_reads_the_keys_of_another_selects_among_them_by_itself(outcomes):
    full, covered, selecting = (
        outcomes(SHARING, {**way, **TWICE}) for way in (FULL, COVERED, SELECTING)
    )
    assert_same(covered, full)
    assert covered[0] == covered[2], "a prefix out of the cache should not matter"
    assert selecting[0] == selecting[2]
    assert abs(selecting[0][1] - full[0][1]) > 0.01, "no other layer can make a difference"


@pytest.mark.parametrize("name", parametrized(SOFTMAX, EVERY_RUN))
def test_sinks_and_soft_caps_are_those_of_vllms_own_attention(outcomes, name):
    full = outcomes(name, FULL)
    assert_same(outcomes(name, COVERED), full)
    if name == "gpt-oss":
        assert_same(outcomes(name, REASSIGNED), full)
    assert len({tuple(tokens) for tokens, _ in full}) == len(full), "prompts should matter"
