"""What a smaller model proposes changes nothing that is said, whatever happens to requests meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, Completion, serving

pytestmark = [pytest.mark.server, pytest.mark.endurance]

FP32 = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "1024")
# Each prompt fills all but some tokens of twelve blocks of 128, and needs a thirteenth to generate. Three
# find room at a time, without one.
LENGTHS = [12 * 128 - short for short in (4, 7, 10, 13, 16, 19, 22, 25)]
CROWDED = ("--max-num-seqs", "4", "--num-gpu-blocks-override", "38")
# Tokens that others share of each: whole query chunks before its last queries.
SHARED = 1280
GENERATED = 64


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "target", 6)


@pytest.fixture(scope="module")
def draft(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "draft", 4)


def same(answers: list[Completion], expected: list[Completion]) -> None:
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def counted(client: Client) -> dict[str, float]:
    names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "num_preemptions")
    counts = {name: client.metric(f"vllm:{name}_total") for name in names}
    return counts | {"hits": client.metric("vllm:prefix_cache_hits_total")}


def test_a_draft_model_changes_nothing_that_is_said_beside_others_preempted_and_with_hits(
    model, draft, prompts
):
    asked = [prompts(seed, length) for seed, length in enumerate(LENGTHS, 980)]
    with serving(model, settings=SPARSE, extra_args=FP32, env=SMALL_WORKERS) as client:
        expected = [client.complete(prompt, GENERATED) for prompt in asked]
    drafts = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    arguments = (*FP32, *CROWDED, "--speculative-config", json.dumps(drafts))
    with serving(model, settings=SPARSE, extra_args=arguments, env=SMALL_WORKERS) as client:
        same([client.complete(asked[0], GENERATED)], expected[:1])
        alone = counted(client)
        assert alone["num_preemptions"] == alone["hits"] == 0
        assert 0 < alone["spec_decode_num_accepted_tokens"] < alone["spec_decode_num_draft_tokens"]
        same([client.complete(asked[0], GENERATED)], expected[:1])
        assert counted(client)["hits"] == SHARED
        same(client.complete_all(asked, GENERATED), expected)
        together = counted(client)
        assert together["num_preemptions"] > 0
        assert (
            together["spec_decode_num_accepted_tokens"]
            > 2 * alone["spec_decode_num_accepted_tokens"]
        )
