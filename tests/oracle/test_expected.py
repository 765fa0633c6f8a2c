"""`expected.json` is what the oracle says today: some of its cases, computed again."""

import pytest

from tests.oracle.cases import (
    ANCHOR_SETTINGS,
    CACHED_SETTINGS,
    DENSE_LAYERS_ANCHOR_SETTINGS,
    DENSE_LAYERS_SETTINGS,
    REASSIGNED_SETTINGS,
    SETTINGS,
    make_anchor_cases,
    make_cached_cases,
    make_cases,
    make_dense_layers_cases,
    make_reassigned_cases,
)
from tests.oracle.expected import REASSIGNED_TOLERANCE, ask, difference, load
from tests.oracle.model import OracleModel


@pytest.fixture(scope="module")
def cases(tokenizer):
    return {case.name: case for case in make_cases(tokenizer)}


@pytest.fixture(scope="module")
def oracle(smollm2):
    return OracleModel(smollm2, SETTINGS)


@pytest.mark.parametrize("name", ["whole-1037", "half-1600", "crowded-1142"])
def test_the_file_holds_what_the_oracle_says(name, cases, oracle):
    expected = load(list(cases.values()))[name]
    again = ask(oracle, cases[name])
    assert difference(again.tokens, again.logprobs, expected) == (None, False)


def test_the_file_for_the_selection_cache_does_too(smollm2, tokenizer):
    cases = {case.name: case for case in make_cached_cases(tokenizer)}
    expected = load(list(cases.values()), CACHED_SETTINGS)
    oracle = OracleModel(smollm2, CACHED_SETTINGS)
    for name in ("cached-1144", "cached-1272"):
        again = ask(oracle, cases[name])
        assert difference(again.tokens, again.logprobs, expected[name]) == (None, False)
    assert 0 < oracle.num_reused < 2 * 24 * oracle.num_layers


@pytest.mark.parametrize(
    "settings",
    [
        DENSE_LAYERS_SETTINGS,
        pytest.param(DENSE_LAYERS_ANCHOR_SETTINGS, marks=pytest.mark.endurance),
    ],
    ids=["all select", "anchors"],
)
def test_the_file_for_dense_layers_does_too(smollm2, tokenizer, settings):
    cases = {case.name: case for case in make_dense_layers_cases(tokenizer)}
    expected = load(list(cases.values()), settings)
    name = next(iter(cases))
    again = ask(OracleModel(smollm2, settings), cases[name])
    assert difference(again.tokens, again.logprobs, expected[name]) == (None, False)


def test_the_file_for_anchors_does_too(smollm2, tokenizer):
    cases = {case.name: case for case in make_anchor_cases(tokenizer)}
    expected = load(list(cases.values()), ANCHOR_SETTINGS)
    name = "anchors-1144"
    prompt, generated = len(cases[name].prompt), cases[name].max_tokens
    assert prompt < ANCHOR_SETTINGS.min_context < prompt + generated - 1, "it begins to select"
    oracle = OracleModel(smollm2, ANCHOR_SETTINGS)
    again = ask(oracle, cases[name])
    assert difference(again.tokens, again.logprobs, expected[name]) == (None, False)
    assert oracle.num_reused > 0


def test_the_file_for_reassigned_positions_does_too(smollm2, tokenizer):
    cases = {case.name: case for case in make_reassigned_cases(tokenizer)}
    expected = load(list(cases.values()), REASSIGNED_SETTINGS)
    oracle = OracleModel(smollm2, REASSIGNED_SETTINGS)
    for name in ("reassigned-1010", "reassigned-1337"):
        again = ask(oracle, cases[name])
        assert difference(again.tokens, again.logprobs, expected[name], REASSIGNED_TOLERANCE) == (
            None,
            False,
        )
