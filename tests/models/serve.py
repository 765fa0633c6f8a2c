"""Serve a tiny model in several ways, one after the other, in this process.

    python -m tests.models.serve FOLDER '[{"attention_backend": "CPU_ATTN"}, ...]'

Each way is a JSON object of arguments of `vllm.LLM`. Prints a line of JSON for each: tokens and the sum
of their log-probabilities for every prompt, or the error that stopped the engine.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from typing import Any

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


def main(folder: str, ways: str) -> None:
    os.environ.update(ENVIRONMENT)
    from vllm.distributed import cleanup_dist_env_and_memory

    for options in json.loads(ways):
        lengths = options.pop("lengths", [40, 200, 131])
        try:
            print(json.dumps(answers(folder, options, lengths)), flush=True)
        except Exception as error:  # any reason to refuse is for the test to read
            print(json.dumps({"error": str(error)}), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
