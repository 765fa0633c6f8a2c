"""A model reads further than it was trained, where positions are reassigned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import openai
import pytest

from tests.oracle.cases import REASSIGNED_SETTINGS, Case, make_reassigned_cases
from tests.oracle.expected import REASSIGNED_TOLERANCE, load
from tests.server.conftest import FP32, Client, serving
from tests.server.test_sparse_equals_oracle import assert_says_what_the_oracle_says

pytestmark = pytest.mark.server

TRAINED = 8192  # tokens
BEYOND = ("--max-model-len", "12288")


@pytest.fixture(scope="module")
def cases(tokenizer) -> list[Case]:
    return make_reassigned_cases(tokenizer)


@pytest.fixture(scope="module")
def client(smollm2) -> Iterator[Client]:
    settings = asdict(REASSIGNED_SETTINGS)
    with serving(smollm2, settings=settings, extra_args=(*FP32, *BEYOND)) as client:
        yield client


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.endurance), 2])
def test_the_answers_are_the_oracles_below_and_beyond_the_trained_length(client, cases, stride):
    expected = load(cases, REASSIGNED_SETTINGS)
    cases = cases[::stride]
    assert max(len(case.prompt) for case in cases) > TRAINED
    for _ in ("the first time", "again, from the prefix cache"):
        assert_says_what_the_oracle_says(client, cases, expected, tolerance=REASSIGNED_TOLERANCE)
    assert client.metric("vllm:prefix_cache_hits_total") > 0.7 * sum(
        len(case.prompt) for case in cases
    )
    assert client.metric("vllm:tokenselect_rows_total") > 0


def test_the_log_says_what_is_being_done(client):
    log = client.server.log()
    assert "trained on 8192 tokens, reads up to 12288" in log
    assert "rotates the queries and keys of 30 attention layers in the model's stead" in log


def test_full_attention_of_one_request_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError, match="positions are reassigned"):
        client.complete([5] * 100, 2, tokenselect="off")
    assert client.complete([5] * 100, 2).tokens


def test_a_budget_beyond_the_trained_length_stops_the_server_and_it_says_what_fits(refusal):
    log = refusal({"positions": "reassigned", "top_k": 8000}, *BEYOND)
    assert "would number up to 9152 attended tokens" in log
    assert "was trained on 8192. Set top_k to at most 7040." in log


def test_native_positions_keep_vllms_guard(refusal):
    log = refusal({}, *BEYOND)
    assert "User-specified max_model_len (12288) is greater than the derived max_model_len" in log
