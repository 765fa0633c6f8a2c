"""A whole vLLM engine on TOKENSELECT against vLLM's own attention, with a small random model.

    python -m benchmarks.gpu_engine

Compares greedy tokens and log-probabilities: with a budget that covers the context TOKENSELECT must
say what full attention says; with a small one, eager execution and CUDA graphs must say the same. Each
engine is a process of its own. Where vllm-tokenselect is not installed, only on the path, its entry
point is announced from a temporary folder. Without a GPU it runs on vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

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


def generate(folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs in the child: greedy tokens and their log-probabilities for every prompt."""
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
    outputs = engine.generate(prompts, sampling)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                at[token].logprob
                for at, token in zip(
                    output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                )
            ],
        }
        for output in outputs
    ]


def announced(folder: Path) -> dict[str, str]:
    """Environment in which vLLM finds the plugin, also where the package is not installed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on a GPU nobody asks for it
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *environment.get("PYTHONPATH", "").split(os.pathsep)]
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


def run(name: str, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]] | None:
    """An engine in a process of its own; None when it does not run."""
    answers = folder / "answers.json"
    answers.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_engine", "--child", str(folder)]
    done = subprocess.run(
        [*command, json.dumps(options)], env=announced(folder), capture_output=True, text=True
    )
    for log in (done.stdout + done.stderr).splitlines():
        if "] TOKENSELECT" in log:
            print(f"    {log[-160:]}")
    if done.returncode or not answers.exists():
        causes = [log for log in (done.stdout + done.stderr).splitlines() if "Error" in log]
        print(f"FAIL {name}: the engine stopped:", *causes[:8], sep="\n    ")
        return None
    return json.loads(answers.read_text())


def compare(name: str, actual: list | None, expected: list | None) -> bool:
    """Tokens must be equal up to where rounding may have parted a close choice."""
    if actual is None or expected is None:
        print(f"FAIL {name}: nothing to compare")
        return False
    largest, equal = 0.0, 0
    for ours, theirs in zip(actual, expected, strict=True):
        shared = next(
            (
                i
                for i, (a, b) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True))
                if a != b
            ),
            len(ours["tokens"]),
        )
        equal += shared == len(ours["tokens"])
        pairs = zip(ours["logprobs"][: shared + 1], theirs["logprobs"][: shared + 1], strict=True)
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
    good = largest <= LARGEST_DIFFERENCE
    print(
        f"{'pass' if good else 'FAIL'} {name}: {equal} of {len(expected)} answers equal token by "
        f"token, log-probabilities within {largest:.3f} up to the first other choice"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder = Path(args.child[0])
        answers = generate(folder, json.loads(args.child[1]))
        (folder / "answers.json").write_text(json.dumps(answers))
        return 0
    import torch

    on_gpu = torch.cuda.is_available()
    full = {"attention_backend": "FLASH_ATTN" if on_gpu else "CPU_ATTN", "enforce_eager": True}

    def ours(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {
            "attention_backend": "TOKENSELECT",
            "additional_config": {"tokenselect": settings},
            "enforce_eager": True,
            **options,
        }

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(MODEL))
        expected = run("full attention", folder, full)
        covering = run("TOKENSELECT, covering budget", folder, ours(COVERING))
        sparse = run("TOKENSELECT, small budget", folder, ours(SMALL_BUDGET))
        good = [
            compare("a budget that covers the context is full attention", covering, expected),
            sparse is not None,
        ]
        for name, settings in (
            ("dense layers beside layers that select", {**COVERING, "dense_layers": 2}),
            ("reassigned positions", REASSIGNED),
        ):
            other = run(name, folder, ours(settings, enforce_eager=False))
            good.append(compare(f"{name}, with graphs: full attention", other, expected))
        if on_gpu:
            graphs = run(
                "TOKENSELECT, CUDA graphs", folder, ours(SMALL_BUDGET, enforce_eager=False)
            )
            good.append(compare("CUDA graphs say what eager execution says", graphs, sparse))
            for name, settings in (("sdpa", {"attention": "sdpa"}), ("flash", {})):
                other = run(name, folder, ours({**SMALL_BUDGET, **settings}))
                good.append(compare(f"attention by {name} says the same", other, sparse))
            options = {"kv_cache_dtype": "fp8"}
            fp8 = run("TOKENSELECT, fp8 KV cache", folder, ours(COVERING, **options))
            full_fp8 = run("full attention, fp8 KV cache", folder, {**full, **options})
            good.append(compare("an fp8 KV cache is that of full attention", fp8, full_fp8))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
