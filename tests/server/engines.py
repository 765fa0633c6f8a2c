"""Engines that one process talks to, made one after the other; writes what each of them answers as JSON.

`python -m tests.server.engines MODEL OUT`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from examples import offline

SETTINGS = {"n_init": 16, "n_local": 64, "query_chunk": 128, "tail_queries": 16}
PROMPT = [index % 97 + 1 for index in range(700)]
DOCUMENT = "The cat sat on the mat. " * 100


def make(model: str, top_k: int | None) -> LLM:
    """An engine that selects so many tokens, or one on vLLM's own backend."""
    options: dict = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 2,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if top_k is not None:
        return offline.start_engine(model, {**SETTINGS, "top_k": top_k}, **options)
    return LLM(model, skip_tokenizer_init=True, **options)


def ask(engine: LLM, **extra_args: object) -> list[float] | str:
    """Log-probabilities of a greedy answer, or why the request was refused."""
    params = SamplingParams(
        max_tokens=4,
        ignore_eos=True,
        temperature=0,
        logprobs=0,
        detokenize=False,
        extra_args=extra_args or None,
    )
    try:
        (output,) = engine.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return [next(iter(each.values())).logprob for each in output.outputs[0].logprobs]


def main(model: str, out: str) -> None:
    requests = {
        "default": {},
        "few": {"tokenselect_top_k": 48},
        "off": {"tokenselect": "off"},
        "too many": {"tokenselect_top_k": 99999},
        "again": {},
    }
    engines = {"256": make(model, 256), "CPU_ATTN": make(model, None)}
    answers: dict[str, dict] = {engine: {} for engine in engines}
    for name, args in requests.items():
        for engine, made in engines.items():
            answers[engine][name] = ask(made, **args)
    answers["example"] = {
        name: offline.ask(engines["256"], DOCUMENT, "Say it again.", **args)
        for name, args in (("default", {}), ("off", {"tokenselect": "off"}))
    }
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
