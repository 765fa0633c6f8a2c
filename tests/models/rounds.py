"""Ask a tiny model in each of the ways in which a server is asked."""

from __future__ import annotations

import random
from typing import Any

# Tokens of prompts, which share their beginning: some pass the end of a chunk of 512 queries.
TOGETHER, AT_ONCE = (1100, 40, 600), (700, 701, 900)
LONGEST = 4096  # tokens that the models are made for
NUM_GENERATED = 5
# With budgets that cover every prompt, so that selecting is full attention.
COVERS = {"n_init": 16, "n_local": 64, "top_k": 1152, "min_context": 0}
SMALL = {"tokenselect_top_k": 48}
OFF = {"tokenselect": "off"}

Answer = tuple[list[int], list[float]]


def ask_in_rounds(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities of each prompt in each round, and what the layers run on.

    Args:
        folder: of the model.
        options: of `vllm.LLM`; with `additional_config` those requests are asked too that only a server
            on TOKENSELECT knows.
    """
    from vllm import LLM, SamplingParams

    from vllm_tokenselect.hooks.layer_backends import describe_layers, group_layers

    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        **options,
    )
    rng = random.Random(0)
    text = [rng.randrange(3, 256) for _ in range(max(TOGETHER))]

    def ask(lengths: tuple[int, ...], **extra_args: Any) -> list[Answer]:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=NUM_GENERATED,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            extra_args=extra_args or None,
        )
        prompts = [{"prompt_token_ids": text[:length]} for length in lengths]
        outputs = [o.outputs[0] for o in engine.generate(prompts, sampling, use_tqdm=False)]
        return [
            (
                list(o.token_ids),
                [step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)],
            )
            for o in outputs
        ]

    rounds = {"together": ask(TOGETHER), "again": ask(TOGETHER), "at once": ask(AT_ONCE)}
    config = engine.llm_engine.vllm_config
    said: dict[str, Any] = {"rounds": rounds, "block_size": config.cache_config.block_size}
    if options["attention_backend"] == "TOKENSELECT":
        if options["additional_config"]["tokenselect"]["positions"] == "native":
            rounds["off"] = ask(
                TOGETHER, **OFF
            )  # refused, for each request, where positions are not
        said["small"] = ask(TOGETHER, **SMALL)
        said["layers"] = group_layers(describe_layers(config))
        scheduler = engine.llm_engine.engine_core.engine_core.scheduler
        said["query_chunk"] = scheduler.chunks.query_chunk
    return said
