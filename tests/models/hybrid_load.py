"""Serve prompts of many lengths to small hybrid models with the prefix cache on, by steps of many sizes.

    python -m tests.models.hybrid_load FOLDER OPTIONS BUDGETS COUNT

Each budget, `max_num_batched_tokens`, is an engine's. It answers COUNT beginnings of one text one by one,
the same again, and all together. Prints for each engine a line of JSON: block size, tokens that came from
the cache, and for each prompt its length and what was said each time.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

from tests.forks import run_in_forks
from tests.models.serve import ENVIRONMENT

LONGEST = 20_000


def load(folder: str, options: dict[str, Any], budget: int, count: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        hf_overrides={"max_position_embeddings": 2 * LONGEST},
        max_model_len=LONGEST + 16,
        max_num_batched_tokens=budget,
        max_num_seqs=8,
        enforce_eager=True,
        distributed_executor_backend="uni",
        attention_backend="TOKENSELECT",
        enable_prefix_caching=True,
        # As by default where a step can hold it.
        additional_config={"tokenselect": {"query_chunk": min(512, budget - 8)}},
        **options,
    )
    rng = random.Random(budget)
    text = [rng.randrange(3, 256) for _ in range(LONGEST)]
    prompts = [{"prompt_token_ids": text[: rng.randint(1, LONGEST)]} for _ in range(count)]
    sampling = SamplingParams(
        temperature=0, max_tokens=4, logprobs=1, detokenize=False, ignore_eos=True
    )

    def ask(some: list[Any]) -> list[Any]:
        return engine.generate(some, sampling, use_tqdm=False)

    alone = [ask([prompt])[0] for prompt in prompts]
    again = [ask([prompt])[0] for prompt in prompts]
    together = ask(prompts)
    said = [
        [len(prompt["prompt_token_ids"]), [_answer(output) for output in ways]]
        for prompt, ways in zip(prompts, zip(alone, again, together, strict=True), strict=True)
    ]
    cached = sum(output.num_cached_tokens for output in again)
    block_size = engine.llm_engine.vllm_config.cache_config.block_size
    return {"block_size": block_size, "cached": cached, "said": said}


def _answer(output: Any) -> list[Any]:
    return [list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob]


def main(folder: str, options: str, budgets: str, count: str) -> None:
    os.environ.update(ENVIRONMENT)
    each = {"folder": folder, "options": json.loads(options), "count": int(count)}
    run_in_forks(load, [{**each, "budget": budget} for budget in json.loads(budgets)])


if __name__ == "__main__":
    main(*sys.argv[1:])
