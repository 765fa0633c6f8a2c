"""What the served model says under selection is what a plain PyTorch forward of the definition says.

Whatever else happens to a request: neighbors, prefix-cache hits, prefill cut into steps, preemption.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.oracle.cases import (
    ANCHOR_SETTINGS,
    CACHED_SETTINGS,
    DENSE_LAYERS_ANCHOR_SETTINGS,
    DENSE_LAYERS_SETTINGS,
    Case,
    make_anchor_cases,
    make_cached_cases,
    make_cases,
    make_dense_layers_cases,
)
from tests.oracle.expected import LOGPROB_TOLERANCE, Expected, difference, load
from tests.oracle.model import Selection
from tests.server.conftest import BLOCK_SIZE, FP32, SPARSE, Client, serving

pytestmark = pytest.mark.server

Cases = dict[str, Case]
CROWD = 3  # requests at a time for which a KV cache is too small


@pytest.fixture(scope="module")
def cases(tokenizer) -> Cases:
    return {case.name: case for case in make_cases(tokenizer)}


@pytest.fixture(scope="module")
def expected(cases) -> dict[str, Expected]:
    return load(list(cases.values()))


def assert_says_what_the_oracle_says(
    client: Client,
    cases: list[Case],
    expected: dict[str, Expected],
    concurrent: int = 10,
    tolerance: float = LOGPROB_TOLERANCE,
) -> None:
    """Send the cases, `concurrent` at a time, and report every one that differs."""
    differing, undecided = [], 0
    for first in range(0, len(cases), concurrent):
        batch = cases[first : first + concurrent]
        served = client.complete_all([case.prompt for case in batch], batch[0].max_tokens)
        for case, answer in zip(batch, served, strict=True):
            found, cut_short = difference(
                answer.tokens, answer.logprobs, expected[case.name], tolerance
            )
            undecided += cut_short
            if found is not None:
                differing.append(f"{case.name}: {found}")
    assert not differing, "\n".join(differing)
    assert undecided <= len(cases) // 8 + 1, (
        f"{undecided} comparisons ended at a token that the oracle leaves open"
    )


def prompts_of(cases: Cases, kind: str) -> list[Case]:
    return [case for name, case in cases.items() if name.startswith(kind)]


# All twenty prompts, of 1,000 to 6,000 tokens, take minutes.
STRIDES = [pytest.param(1, marks=pytest.mark.endurance, id="all"), pytest.param(3, id="seven")]


@pytest.mark.parametrize("stride", STRIDES)
def test_alone_and_beside_others(sparse_client, cases, expected, stride):
    whole = prompts_of(cases, "whole")[::stride]
    assert_says_what_the_oracle_says(sparse_client, whole, expected)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", ["whole", "half"], ids=["again", "half-shared"])
def test_with_prefix_hits(sparse_client, cases, expected, kind, stride):
    """Relies on the prompts of the test above being in the prefix cache."""
    chosen = prompts_of(cases, kind)[::stride]
    before = sparse_client.metric("vllm:prefix_cache_hits_total")
    assert_says_what_the_oracle_says(sparse_client, chosen, expected)
    hits = sparse_client.metric("vllm:prefix_cache_hits_total") - before
    assert hits > (0.7 if kind == "whole" else 0.25) * sum(len(case.prompt) for case in chosen)


@pytest.mark.endurance
def test_when_requests_are_preempted_and_prefill_is_cut_into_the_smallest_steps(
    smollm2, cases, expected
):
    crowded = prompts_of(cases, "crowded")
    blocks_each = -(-len(crowded[0].prompt) // BLOCK_SIZE)
    # Three prompts fit, and none of what they generate. One block is vLLM's own.
    arguments = ("--dtype", "float32", "--num-gpu-blocks-override", str(3 * blocks_each + 1))
    steps = ("--max-model-len", "1200", "--max-num-seqs", "6", "--max-num-batched-tokens", "262")
    with serving(smollm2, settings=SPARSE, extra_args=(*arguments, *steps)) as client:
        assert_says_what_the_oracle_says(client, crowded, expected)
        assert client.metric("vllm:num_preemptions_total") > 0


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.endurance), 2])
def test_with_the_selection_cache(smollm2, tokenizer, stride):
    cases = make_cached_cases(tokenizer)
    expected = load(cases, CACHED_SETTINGS)
    cases = cases[::stride]
    with serving(smollm2, settings=asdict(CACHED_SETTINGS), extra_args=FP32) as client:
        for _ in ("the first time", "again, from the prefix cache"):
            assert_says_what_the_oracle_says(client, cases, expected)


@pytest.mark.parametrize(
    ("settings", "anchors"),
    [
        (DENSE_LAYERS_SETTINGS, "all"),
        # Every seventh of the layers that select.
        pytest.param(DENSE_LAYERS_ANCHOR_SETTINGS, 7, marks=pytest.mark.endurance),
    ],
    ids=["all select", "anchors"],
)
def test_with_dense_layers_preemption_and_the_smallest_steps(smollm2, tokenizer, settings, anchors):
    """And with the Selection Cache in the layers that select."""
    crowded = make_dense_layers_cases(tokenizer)
    expected = load(crowded, settings)
    # The three prompts fit, and none of what they generate.
    with serving_crowded(smollm2, crowded, settings, anchors) as client:
        assert_says_what_the_oracle_says(client, crowded, expected)
        assert client.metric("vllm:num_preemptions_total") > 0
        log = client.server.log()
    assert "layers 0-1: CPU_ATTN (dense_layers 2); layers 2-29: TOKENSELECT" in log


def test_with_anchors_and_a_least_context_preemption_and_prefix_hits(smollm2, tokenizer):
    """And with the Selection Cache in the anchors, and the smallest steps.

    Requests begin to select while they generate, and some are preempted after that.
    """
    cases = make_anchor_cases(tokenizer)
    expected = load(cases, ANCHOR_SETTINGS)
    crowd, others = cases[:CROWD], cases[CROWD:]
    with serving_crowded(smollm2, crowd, ANCHOR_SETTINGS) as client:
        assert_says_what_the_oracle_says(client, crowd, expected)
        preempted = client.metric("vllm:num_preemptions_total")
        hits = client.metric("vllm:prefix_cache_hits_total")
        # From the prefix cache all are read in two steps, and go on to generate together.
        assert_says_what_the_oracle_says(client, crowd, expected)
        assert client.metric("vllm:num_preemptions_total") > preempted > 0
        hits = client.metric("vllm:prefix_cache_hits_total") - hits
        assert hits > 0.5 * sum(len(case.prompt) for case in crowd)
        assert_says_what_the_oracle_says(client, others, expected, concurrent=CROWD)
        for kind in ("shared", "reused"):
            assert client.metric("vllm:tokenselect_rows_total", kind=kind) > 0


def serving_crowded(
    model: Path, crowd: list[Case], settings: Selection, anchors: object = None
) -> AbstractContextManager[Client]:
    """A server that holds these prompts at once, and nothing of what they generate; its steps are small."""
    # One block is vLLM's own.
    blocks = 1 + sum(-(-len(case.prompt) // BLOCK_SIZE) for case in crowd)
    arguments = ("--num-gpu-blocks-override", str(blocks), "--max-model-len", "1700")
    steps = str(settings.query_chunk + 4)
    arguments += ("--max-num-seqs", "4", "--max-num-batched-tokens", steps)
    served = asdict(settings) | ({} if anchors is None else {"anchor_layers": anchors})
    return serving(model, settings=served, extra_args=("--dtype", "float32", *arguments))
