"""Whole vLLM engines on TOKENSELECT beside vLLM's own attention, with a small random model.

Greedy tokens and log-probabilities are compared. With a budget that covers the context TOKENSELECT must
say what full attention says; with a small one, eager execution and CUDA graphs must say the same. Each
engine is a process of its own. Without a GPU the tests that need none run on vLLM's CPU build.
"""

import functools
import json
import os
import random
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = [pytest.mark.gpu, pytest.mark.server]

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PROMPT_LENGTHS = (40, 700, 1500, 3100)
SMALL_BUDGET = {"top_k": 256, "n_init": 32, "n_local": 128, "query_chunk": 128}
COVERING = {"top_k": 8192}
# Reassigned positions must lie within the model's own.
REASSIGNED = {"top_k": 4096, "positions": "reassigned"}
LARGEST_DIFFERENCE = 0.08  # of log-probabilities in bf16
SECONDS = 90  # for an engine to start and answer

FULL = {"attention_backend": "FLASH_ATTN" if ON_GPU else "CPU_ATTN", "enforce_eager": True}
GRAPHS = {"enforce_eager": False}
FP8 = {"kv_cache_dtype": "fp8"}


def generate(folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Start an engine and return the greedy tokens of every prompt with their log-probabilities."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        seed=0,
        **options,
    )
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(2048) for _ in range(n)]} for n in PROMPT_LENGTHS
    ]
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=1, detokenize=False)
    answers = [output.outputs[0] for output in engine.generate(prompts, sampling)]
    return [
        {
            "tokens": list(answer.token_ids),
            "logprobs": [
                at[token].logprob
                for at, token in zip(answer.logprobs, answer.token_ids, strict=True)
            ],
        }
        for answer in answers
    ]


def announced(folder: Path) -> dict[str, str]:
    """Environment in which vLLM finds the plugin, also where the package is not installed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, so that its end ends all
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a GPU takes what it has
    paths = [str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        distribution("vllm-tokenselect")
    except PackageNotFoundError:
        info = folder / "vllm_tokenselect-0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: vllm-tokenselect\nVersion: 0\n"
        )
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\ntokenselect = vllm_tokenselect.plugin:register\n"
        )
        paths.append(str(folder))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


@pytest.fixture(scope="module")
def say(tmp_path_factory):
    """What an engine of some options says; each is started once, in a process of its own."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))

    @functools.cache
    def run(options: str) -> list[dict[str, Any]]:
        answers = folder / "answers.json"
        answers.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.gpu_device.test_engine", str(folder), options]
        done = subprocess.run(
            command, env=announced(folder), capture_output=True, text=True, timeout=SECONDS
        )
        lines = (done.stdout + done.stderr).splitlines()
        print(*(line[-160:] for line in lines if "] TOKENSELECT" in line), sep="\n", flush=True)
        causes = [line for line in lines if "Error" in line] or lines[-8:]
        assert done.returncode == 0, "\n".join(["the engine stopped:", *causes[:8]])
        return json.loads(answers.read_text())

    return lambda options: run(json.dumps(options))


def ours(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Options of an engine on TOKENSELECT."""
    return {
        "attention_backend": "TOKENSELECT",
        "additional_config": {"tokenselect": settings},
        "enforce_eager": True,
        **options,
    }


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Tokens must be equal up to where rounding may have parted a close choice."""
    largest, equal = 0.0, 0
    for found, wanted in zip(actual, expected, strict=True):
        count = len(wanted["tokens"])
        choices = zip(found["tokens"], wanted["tokens"], strict=True)
        shared = next((i for i, (a, b) in enumerate(choices) if a != b), count)
        equal += shared == count
        pairs = zip(found["logprobs"][: shared + 1], wanted["logprobs"][: shared + 1], strict=True)
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
    print(
        f"{equal} of {len(expected)} answers equal token by token, log-probabilities within "
        f"{largest:.3f} up to the first other choice "
    )
    assert largest <= LARGEST_DIFFERENCE


def test_a_budget_that_covers_the_context_is_full_attention(say):
    assert_same(say(ours(COVERING)), say(FULL))


def test_so_it_is_with_graphs(say):
    assert_same(say(ours(COVERING, **GRAPHS)), say(FULL))


@needs_gpu
def test_graphs_say_what_eager_execution_says(say):
    assert_same(say(ours(SMALL_BUDGET, **GRAPHS)), say(ours(SMALL_BUDGET)))


@needs_gpu
def test_an_fp8_cache_is_that_of_full_attention(say):
    assert_same(say(ours(COVERING, **FP8)), say(FULL | FP8))


@pytest.mark.parametrize(
    "settings",
    [{**COVERING, "dense_layers": 2}, REASSIGNED],
    ids=["dense layers", "reassigned positions"],
)
def test_with_graphs_other_settings_say_what_full_attention_says(say, settings):
    assert_same(say(ours(settings, **GRAPHS)), say(FULL))


@needs_gpu
@pytest.mark.parametrize("settings", [{"attention": "sdpa"}, {"attention": "flash"}])
def test_every_library_says_the_same(say, settings):
    assert_same(say(ours(SMALL_BUDGET | settings)), say(ours(SMALL_BUDGET)))


def test_a_small_budget_is_served(say):
    said = say(ours(SMALL_BUDGET))
    assert [len(answer["tokens"]) for answer in said] == [24] * len(PROMPT_LENGTHS)


if __name__ == "__main__":
    model = Path(sys.argv[1])
    (model / "answers.json").write_text(json.dumps(generate(model, json.loads(sys.argv[2]))))
