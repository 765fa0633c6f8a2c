"""`expected.json` is what the oracle says today: some of its cases, computed again."""

import pytest

from tests.oracle.cases import (
    CACHED_SETTINGS,
    DENSE_LAYERS_SETTINGS,
    REASSIGNED_SETTINGS,
    SETTINGS,
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


def test_the_file_for_dense_layers_does_too(smollm2, tokenizer):
    cases = {case.name: case for case in make_dense_layers_cases(tokenizer)}
    expected = load(list(cases.values()), DENSE_LAYERS_SETTINGS)
    name = next(iter(cases))
    again = ask(OracleModel(smollm2, DENSE_LAYERS_SETTINGS), cases[name])
    assert difference(again.tokens, again.logprobs, expected[name]) == (None, False)


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
