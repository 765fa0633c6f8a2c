"""Serve a small hybrid model, with drafts by its own layer and without, each engine in a fork.

    python -m tests.models.drafted FOLDER JOBS.json

A job has the attention backend, its `top_k`, and how many tokens are drafted at a time. Prints a line of
JSON for each: for every prompt its tokens and how far the log-probability of each is above the second
best one's, and how many drafts were proposed and accepted.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from tests.forks import run_in_forks
from tests.models.serve import ENVIRONMENT

LENGTHS = (200, 333, 700, 1300)
GENERATED = 40
SETTINGS = {"n_init": 4, "n_local": 16, "query_chunk": 32, "tail_queries": 3, "min_context": 0}
COUNTED = "vllm:spec_decode_num_"


def serve(folder: str, backend: str, top_k: int, drafts: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"attention_backend": backend}
    if backend == "TOKENSELECT":
        settings = {**SETTINGS, "top_k": top_k, "similarity_threshold": 1}
        options["additional_config"] = {"tokenselect": settings}
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    engine = LLM(
        model=folder,
        dtype="bfloat16",  # vLLM's gated delta nets on CPUs take no other
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_batched_tokens=1536,
        max_num_seqs=2,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        **options,
    )
    rng = random.Random(0)
    text = [rng.randrange(3, 256) for _ in range(max(LENGTHS))]
    sampling = SamplingParams(
        temperature=0, max_tokens=GENERATED, logprobs=2, detokenize=False, ignore_eos=True
    )
    said = []
    for length in LENGTHS:  # one by one: in bf16 kernels round otherwise beside others
        (output,) = engine.generate({"prompt_token_ids": text[:length]}, sampling, use_tqdm=False)
        chosen = output.outputs[0]
        leads = []
        for step in chosen.logprobs:
            best, second, *_ = sorted((one.logprob for one in step.values()), reverse=True)
            leads.append(best - second)
        said.append([list(chosen.token_ids), leads])
    counts = {m.name: m.value for m in engine.get_metrics() if hasattr(m, "value")}
    return {
        "said": said,
        "drafted": counts.get(f"{COUNTED}draft_tokens", 0),
        "accepted": counts.get(f"{COUNTED}accepted_tokens", 0),
    }


def main(folder: str, jobs: str) -> None:
    os.environ.update(ENVIRONMENT)
    run_in_forks(serve, [{"folder": folder, **job} for job in json.loads(Path(jobs).read_text())])


if __name__ == "__main__":
    main(*sys.argv[1:])
