"""Serve tiny models in several ways, one after the other, each in a fork of this process.

    python -m tests.models.serve JOBS.json

A job is a folder and arguments of `vllm.LLM`. Prints a line of JSON for each: tokens and the sum of their
log-probabilities for every prompt, or the error that stopped the engine. With `"ask": "start"` in place of
prompts, what its layers run on; with `"ask": "doctor"`, what `tokenselect doctor` says that it would do;
with `"ask": "rounds"`, what it answers in each of the ways of `tests.models.rounds`;
with `"ask": "images"`, what `tests.models.seeing` asks.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.forks import run_in_forks
from tests.models import seeing
from tests.models.rounds import ask_in_rounds
from vllm_tokenselect.hooks.layers import examine_model

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def answers(folder: str, options: dict[str, Any], lengths: list[int]) -> list[Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        block_size=32,
        enforce_eager=True,
        distributed_executor_backend="uni",
        **options,
    )
    rng = random.Random(0)
    text = [rng.randrange(3, 256) for _ in range(max(lengths))]
    sampling = SamplingParams(
        temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": text[:length]} for length in lengths]
    outputs = [output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=False)]
    return [[list(o.token_ids), o.cumulative_logprob] for o in outputs]


def layers(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    from vllm_tokenselect.hooks.layer_backends import describe_layers, group_layers

    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        **options,
    )
    config = engine.llm_engine.vllm_config
    return {
        "layers": group_layers(describe_layers(config)),
        "block_size": config.cache_config.block_size,
        "query_chunk": engine.llm_engine.engine_core.engine_core.scheduler.chunks.query_chunk,
    }


def answer(folder: str, options: dict[str, Any], log: str | None = None) -> Any:
    """What is asked of a model, in a process of its own, whose output a file may take."""
    if log is not None:
        with Path(log).open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    options = dict(options)
    lengths = options.pop("lengths", [40, 200, 131])
    kind = options.pop("ask", "answers")
    try:
        if kind == "doctor":
            return doctor(folder, options)
        if kind == "start":
            return layers(folder, options)
        if kind == "rounds":
            return ask_in_rounds(folder, options)
        if kind == "images":
            return seeing.answers(folder, **options)
        return answers(folder, options, lengths)
    except Exception as error:  # any reason to refuse is for the test to read
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def doctor(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    options.pop("attention_backend", None)
    settings = options.pop("additional_config", {}).get("tokenselect", {})
    return asdict(examine_model(folder, settings, options))


def main(jobs: str) -> None:
    os.environ.update(ENVIRONMENT)
    run_in_forks(
        answer,
        [{"folder": f, "options": options} for f, options in json.loads(Path(jobs).read_text())],
    )


if __name__ == "__main__":
    main(sys.argv[1])
