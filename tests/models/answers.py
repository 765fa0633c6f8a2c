"""Print what a small model answers, and again after requests of NaN, each as a line of JSON.

python -m tests.models.answers FOLDER
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

from tests.models.serve import ENVIRONMENT
from tests.models.zoo import COMMON

LENGTHS = (40, 300, 420, 700, 1100)
SETTINGS = {"top_k": 256, "n_init": 32, "n_local": 128, "query_chunk": 256, "min_context": 0}
BLOCK_SIZE, LONGEST = 32, 1600


def answers(engine: Any, extra_args: dict[str, str]) -> list[Any]:
    """Greedy tokens and their log-probabilities, exactly."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=16,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
        extra_args=extra_args,
    )
    rng = random.Random(0)
    text = [rng.randrange(3, 256) for _ in range(max(LENGTHS))]
    said = []
    for length in LENGTHS:  # one by one: what a step holds beside a prompt is the same each time
        (output,) = engine.generate({"prompt_token_ids": text[:length]}, sampling, use_tqdm=False)
        chosen = output.outputs[0]
        logprobs = [
            step[t].logprob for t, step in zip(chosen.token_ids, chosen.logprobs, strict=True)
        ]
        said.append([length, list(chosen.token_ids), logprobs])
    return said


def main(folder: str) -> None:
    os.environ.update(ENVIRONMENT)
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=512,
        max_num_seqs=2,
        max_model_len=LONGEST + 32,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=LONGEST // BLOCK_SIZE + 4,  # every block is used again soon
        enable_prefix_caching=False,
        enable_prompt_embeds=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        attention_backend="TOKENSELECT",
        additional_config={"tokenselect": SETTINGS},
    )
    spoiled = {"prompt_embeds": torch.full((LONGEST, COMMON["hidden_size"]), float("nan"))}
    for nan_first in (False, True):
        for way in ({}, {"tokenselect": "off"}):
            if nan_first:
                sampling = SamplingParams(max_tokens=2, detokenize=False, extra_args=way)
                engine.generate(spoiled, sampling, use_tqdm=False)
            print(json.dumps(answers(engine, way)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
