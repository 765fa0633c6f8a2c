"""What a smaller model or layers of a model propose changes nothing that is said, whatever happens to
requests meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.heads import echo_tokens, save_eagle, save_eagle3, save_mimo
from tests.models.shortened import first_layers
from tests.models.zoo import save
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, Completion, serving
from tests.server.counted import ATTENDED, CONTEXT, ROWS

pytestmark = [pytest.mark.server, pytest.mark.endurance]

FP32 = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "1024")
# Each prompt fills all but some tokens of twelve blocks of 128, and needs a thirteenth to generate. Three
# find room at a time, without one.
LENGTHS = [12 * 128 - short for short in (4, 7, 10, 13, 16, 19, 22, 25)]
CROWDED = ("--max-num-seqs", "4", "--num-gpu-blocks-override", "38")
# Tokens that others share of each: whole query chunks before its last queries.
SHARED = 1280
# With drafts that read hidden states vLLM drops the last block of a hit, which then ends a chunk earlier.
SHARED_WITH_HEADS = 1024
GENERATED = 64


# A model whose hidden states heads read, and the same as a Qwen2.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
}


def same(answers: list[Completion], expected: list[Completion]) -> None:
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def counted(client: Client) -> dict[str, float]:
    names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "num_preemptions")
    counts = {name: client.metric(f"vllm:{name}_total") for name in names}
    return counts | {"hits": client.metric("vllm:prefix_cache_hits_total")}


def serve_with_drafts(
    model: Path,
    drafts: dict[str, Any],
    asked: list[list[int]],
    expected: list[Completion],
    *more: str,
    shared: int = SHARED,
) -> None:
    """Ask one prompt, the same again, and all at once, with too few blocks; all is said as expected."""
    drafts = {"num_speculative_tokens": 3, **drafts}
    arguments = (*FP32, *CROWDED, "--speculative-config", json.dumps(drafts), *more)
    with serving(model, settings=SPARSE, extra_args=arguments, env=SMALL_WORKERS) as client:
        same([client.complete(asked[0], GENERATED)], expected[:1])
        alone = counted(client)
        assert alone["num_preemptions"] == alone["hits"] == 0
        assert 0 < alone["spec_decode_num_accepted_tokens"] < alone["spec_decode_num_draft_tokens"]
        same([client.complete(asked[0], GENERATED)], expected[:1])
        assert counted(client)["hits"] == shared
        same(client.complete_all(asked, GENERATED), expected)
        together = counted(client)
        assert together["num_preemptions"] > 0
        assert (
            together["spec_decode_num_accepted_tokens"]
            > 2 * alone["spec_decode_num_accepted_tokens"]
        )
        assert client.metric(ROWS, kind="reselected") > 0 == client.metric(ROWS, kind="reused")
        assert client.metric(ATTENDED) < 0.7 * client.metric(CONTEXT)


def test_a_draft_model_changes_nothing_that_is_said_beside_others_preempted_and_with_hits(
    smollm2, prompts, tmp_path
):
    model = first_layers(smollm2, tmp_path / "target", 6)
    draft = first_layers(smollm2, tmp_path / "draft", 4)
    asked = [prompts(seed, length) for seed, length in enumerate(LENGTHS, 980)]
    with serving(model, settings=SPARSE, extra_args=FP32, env=SMALL_WORKERS) as client:
        expected = [client.complete(prompt, GENERATED) for prompt in asked]
    serve_with_drafts(model, {"method": "draft_model", "model": str(draft)}, asked, expected)


def llama(folder: Path) -> Path:
    return save(folder, "Llama", SMALL)


def mimo(folder: Path) -> Path:
    return save_mimo(folder, SMALL)


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        pytest.param(llama, {"eagle": save_eagle, "eagle3": save_eagle3}, id="EAGLE and EAGLE-3"),
        pytest.param(mimo, {"mtp": None}, id="MTP"),
    ],
)
def test_layers_that_draft_change_nothing_that_is_said_beside_others_preempted_and_with_hits(
    make: Callable[[Path], Path], heads: dict[str, Callable[..., Path] | None], tmp_path
):
    model = echo_tokens(make(tmp_path / "target"))
    asked = [random.Random(length).choices(range(3, 512), k=length) for length in LENGTHS]
    without = "--skip-tokenizer-init"
    with serving(model, settings=SPARSE, extra_args=(*FP32, without), env=SMALL_WORKERS) as client:
        expected = [client.complete(prompt, GENERATED) for prompt in asked]
    for method, save_head in heads.items():
        drafts = {"method": method}
        if save_head:
            drafts["model"] = str(save_head(model, tmp_path / method))
        serve_with_drafts(model, drafts, asked, expected, without, shared=SHARED_WITH_HEADS)
