"""A vLLM engine on the GPU path says what it says on the CPU path, which the oracle model checks."""

import json
import subprocess
import sys
from functools import partial
from itertools import chain

import pytest

pytest.importorskip("vllm")

from tests.models.families import FAMILIES
from tests.models.heads import save_eagle, save_mimo
from tests.models.shortened import first_layers
from tests.models.zoo import save

pytestmark = pytest.mark.server

MODEL = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
}
# Layers that read the keys of others, and heads that FlashAttention does not take on most GPUs.
GEMMA_4_E = {
    **FAMILIES["Gemma 4 E"][1],
    "global_head_dim": 512,
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "tie_word_embeddings": False,
}
SHARING = {"folder": "Gemma 4 E"}
# Without the Selection Cache; one of the two layers follows the other, and short contexts are dense.
NO_CACHE = {
    "similarity_threshold": 1,
    "anchor_layers": 2,
    "min_context": 132,
    "tail_queries": 5,  # more than a graph of steps with drafts has of a request
}
REASSIGNED = {"positions": "reassigned"}
DRAFTS = {"settings": NO_CACHE, "drafts": 3}
MTP = {"folder": "MiMo", "settings": NO_CACHE}
JOBS = {
    "cpu": {"path": "cpu"},
    "gpu": {"path": "gpu", "sleep": True, "replayed": True},
    "cpu, fitted length": {"path": "cpu", "max_model_len": -1},
    "gpu, fitted length": {"path": "gpu", "max_model_len": -1},
    "cpu, no cache": {"path": "cpu", "settings": NO_CACHE, "rounds": 1},
    "cpu, drafts": {"path": "cpu", "settings": NO_CACHE, "drafts": 3, "rounds": 1},
    "gpu, drafts": {
        "path": "gpu",
        "settings": NO_CACHE,
        "drafts": 3,
        "rounds": 1,
        "replayed": True,
    },
    "cpu, a draft model": {"path": "cpu", **DRAFTS, "drafter": {"method": "draft_model"}},
    "gpu, a draft model": {
        "path": "gpu",
        **DRAFTS,
        "drafter": {"method": "draft_model"},
        "rounds": 1,
        "replayed": True,
    },
    "cpu, eagle": {"path": "cpu", **DRAFTS, "drafter": {"method": "eagle"}},
    "gpu, eagle": {
        "path": "gpu",
        **DRAFTS,
        "drafter": {"method": "eagle"},
        "rounds": 1,
        "replayed": True,
    },
    "cpu, a target with MTP": {"path": "cpu", **MTP},
    "cpu, mtp": {"path": "cpu", **MTP, "drafts": 2, "drafter": {"method": "mtp"}},
    "cpu, reassigned": {"path": "cpu", "settings": REASSIGNED, "rounds": 1},
    "gpu, reassigned": {"path": "gpu", "settings": REASSIGNED, "rounds": 1},
    "cpu, sharing": {"path": "cpu", **SHARING},
    "gpu, sharing": {"path": "gpu", **SHARING},
}
# For `make endurance`: the interpreter takes many minutes for scores of the first one's length.
SLOW = {
    "gpu, fitted length",
    "cpu, sharing",
    "gpu, sharing",
    "cpu, a draft model",
    "cpu, eagle",
    "gpu, eagle",
    "cpu, a target with MTP",
    "cpu, mtp",
}
# What proposes tokens to the model in `folder`.
DRAFTERS = {"draft_model": partial(first_layers, count=1), "eagle": save_eagle}


@pytest.fixture(scope="module")
def rounds(request, tmp_path_factory) -> dict[str, list]:
    """What each engine says, in each round."""
    items = [item for item in request.session.items if item.path == request.path]
    endurance = any(item.get_closest_marker("endurance") for item in items)
    chosen = [name for name in JOBS if name not in SLOW or endurance]
    folder = save(tmp_path_factory.mktemp("model"), "Llama", MODEL)
    if endurance:
        save(folder / SHARING["folder"], "Gemma4Text", GEMMA_4_E)
        save_mimo(folder / MTP["folder"], MODEL)
    drafters = tmp_path_factory.mktemp("drafters")
    for method, make in DRAFTERS.items():
        make(folder, drafters / method)
    jobs = [{"settings": {}} | JOBS[name] for name in chosen]
    jobs = [job | {"folder": str(folder / job.get("folder", ""))} for job in jobs]
    for job in jobs:
        if job.get("drafter", {}).get("method") in DRAFTERS:
            job["drafter"] = {**job["drafter"], "model": str(drafters / job["drafter"]["method"])}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.gpu.engine", str(folder), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line[:2] in ("[[", '{"')]
    assert len(said) == len(chosen), done.stdout[-3000:] + done.stderr[-3000:]
    assert not any("error" in one for one in said), done.stdout[-3000:] + done.stderr[-3000:]
    return dict(zip(chosen, said, strict=True))


def assert_same(actual, expected):
    for ours, theirs in zip(chain(*actual), chain(*expected[: len(actual)]), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)


def cached(answers):
    return [answer["cached"] for answer in answers]


def test_the_gpu_path_says_what_the_cpu_path_says(rounds):
    expected = rounds["cpu"]
    *actual, woken = rounds["gpu"]
    assert_same(actual, expected)
    assert cached(actual[1]) == cached(expected[1]) != [0] * 4
    # After a deep sleep.
    assert_same([woken], actual[:1])
    assert cached(woken) == cached(actual[0])


@pytest.mark.parametrize("path", ["cpu", pytest.param("gpu", marks=pytest.mark.endurance)])
def test_a_context_that_vllm_fits_to_the_kv_cache_changes_nothing_that_is_said(rounds, path):
    assert_same(rounds[f"{path}, fitted length"], rounds["cpu"])


@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_drafts_by_n_gram_change_nothing_that_is_said(rounds, path):
    assert_same(rounds[f"{path}, drafts"], rounds["cpu, no cache"])


def accepted(rounds):
    return rounds[-1][-1]["accepted"]


@pytest.mark.parametrize("path", [pytest.param("cpu", marks=pytest.mark.endurance), "gpu"])
def test_a_draft_model_changes_nothing_that_is_said(rounds, path):
    assert_same(rounds[f"{path}, a draft model"], rounds["cpu, no cache"] * 2)
    assert accepted(rounds[f"{path}, a draft model"]) > 0


@pytest.mark.endurance
@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_an_eagle_head_changes_nothing_that_is_said(rounds, path):
    assert_same(rounds[f"{path}, eagle"], rounds["cpu, no cache"] * 2)


@pytest.mark.endurance
def test_layers_that_predict_several_tokens_change_nothing_that_is_said(rounds):
    assert_same(rounds["cpu, mtp"], rounds["cpu, a target with MTP"])


def test_the_gpu_path_says_what_the_cpu_path_says_at_reassigned_positions(rounds):
    """Without CUDA graphs, unlike the others."""
    reassigned = rounds["cpu, reassigned"]
    assert_same(rounds["gpu, reassigned"], reassigned)
    assert [a["tokens"] for a in reassigned[0]] != [a["tokens"] for a in rounds["cpu"][0]]


@pytest.mark.endurance
def test_the_gpu_path_serves_large_heads_and_layers_that_read_the_keys_of_others(rounds):
    assert_same(rounds["gpu, sharing"], rounds["cpu, sharing"])
