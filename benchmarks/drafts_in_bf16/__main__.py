"""Does a model say the same in bf16 with drafts and without, and what makes the difference?

    python -m benchmarks.drafts_in_bf16 --json benchmarks/results/drafts-in-bf16.json

The first six layers of SmolLM2 answer four prompts, one by one and all at once: without drafts, with those
of its first four layers, and with n-grams, on vLLM's own backend and on TOKENSELECT. Then a layer's
products are computed for one row at a time and for several: how many elements differ, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

from benchmarks.report import SMOLLM2, write_figures
from tests.forks import answers_of_forks
from tests.models.shortened import first_layers
from vllm_tokenselect.tools.common.provenance import cpu_name, versions
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

BACKENDS = ("CPU_ATTN", "TOKENSELECT")
DRAFTERS = ("none", "draft_model", "ngram")
SETTINGS = {"top_k": 64, "n_init": 16, "n_local": 32, "query_chunk": 64, "tail_queries": 16}
CAT = "The cat sat on the mat, and the dog did not. " * 10
TEXT = CAT + "In the year 1842 a ship came to the harbor with three hundred sheep. " * 12
GENERATED = 60
ROWS, SAMPLES = (2, 3, 4, 5, 8, 16, 24, 48), 240


def make_engine(folder: str, dtype: str, backend: str, drafter: str) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {"attention_backend": backend}
    if backend == "TOKENSELECT":
        settings = {**SETTINGS, "similarity_threshold": 1}
        options["additional_config"] = {"tokenselect": settings}
    if drafter == "draft_model":
        options["speculative_config"] = {"method": drafter, "model": f"{folder}/draft"}
    if drafter == "ngram":
        options["speculative_config"] = {"method": drafter, "prompt_lookup_max": 3}
    if drafter != "none":
        options["speculative_config"]["num_speculative_tokens"] = 3
    return LLM(
        model=f"{folder}/target",
        dtype=dtype,
        max_model_len=2048,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **options,
    )


def say(engine: Any) -> dict[str, list[Any]]:
    """For each prompt the tokens, their log-probabilities, and how far the second best ones are below."""
    from vllm import SamplingParams

    ids = engine.get_tokenizer().encode(TEXT)
    texts = [ids[:300], ids[:300] + ids[100:150], ids[:40], ids]
    prompts = [{"prompt_token_ids": text} for text in texts]
    sampling = SamplingParams(
        temperature=0, max_tokens=GENERATED, logprobs=2, detokenize=False, ignore_eos=True
    )

    def answers(some: list[Any]) -> list[Any]:
        said = []
        for output in engine.generate(some, sampling, use_tqdm=False):
            steps = [
                sorted((t.logprob for t in step.values()), reverse=True)[:2]
                for step in output.outputs[0].logprobs
            ]
            tokens = list(output.outputs[0].token_ids)
            said.append([tokens, [best for best, _ in steps], [a - b for a, b in steps]])
        return said

    alone = [answer for prompt in prompts for answer in answers([prompt])]
    return {"alone": alone, "together": answers(prompts)}


def differing_elements(engine: Any) -> dict[str, Any]:
    """Of products of many rows, elements that a product of one row has otherwise."""
    import torch

    layer = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[1]
    products = {
        "qkv_proj": layer.self_attn.qkv_proj,
        "o_proj": layer.self_attn.o_proj,
        "gate_up_proj": layer.mlp.gate_up_proj,
        "down_proj": layer.mlp.down_proj,
    }
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, linear in products.items():
            x = torch.randn(SAMPLES, linear.input_size, dtype=torch.bfloat16)
            one = torch.cat([linear(row)[0] for row in x.split(1)])
            found[name] = {"elements": one.numel()}
            for rows in ROWS:
                many = torch.cat([linear(part)[0] for part in x.split(rows)])
                found[name][str(rows)] = int((many != one).sum())
    return found


def run(
    folder: str, dtype: str, backend: str, drafter: str, products: bool = False
) -> dict[str, Any]:
    engine = make_engine(folder, dtype, backend, drafter)
    return differing_elements(engine) if products else say(engine)


def compare(expected: list[Any], actual: list[Any]) -> dict[str, Any]:
    """Where a prompt's answers part, between tokens how far apart, and what differs before."""
    (tokens, logprobs, leads), (others, other_logprobs, _) = expected, actual
    pairs = zip(tokens, others, strict=True)
    parts = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    both = list(zip(logprobs, other_logprobs, strict=True))[:parts]
    return {
        "parts_at": parts,
        "lead_there": None if parts is None else leads[parts],
        "largest_difference_before": max((abs(a - b) for a, b in both), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("target", 6), ("draft", 4)):
            first_layers(ensure_smollm2(), Path(folder) / name, count)
        ways = list(product(("bfloat16", "float32"), BACKENDS, DRAFTERS))
        names = ("dtype", "backend", "drafter")
        jobs: list[dict[str, Any]] = [dict(zip(names, way, strict=True)) for way in ways]
        jobs.append({**jobs[0], "products": True})
        each = [{"folder": folder, **job} for job in jobs]
        *said, products = [answer for _, answer in answers_of_forks(run, each, seconds=600)]
    by_way = dict(zip(ways, said, strict=True))
    compared = []
    for (dtype, backend, drafter), answers in by_way.items():
        without = by_way[dtype, backend, "none"]
        for sent in ("alone", "together") if drafter != "none" else ():
            for prompt, (one, other) in enumerate(zip(without[sent], answers[sent], strict=True)):
                way = {"dtype": dtype, "backend": backend, "drafter": drafter, "sent": sent}
                compared.append({**way, "prompt": prompt, **compare(one, other)})
                print(*compared[-1].values(), flush=True)
    print(products)
    write_figures(
        args.json,
        args,
        model=f"first 6 layers of {SMOLLM2}",
        cpu=cpu_name(),
        versions=versions(("vllm", "vllm-tokenselect", "torch")),
        compared=compared,
        differing_elements=products,
    )


if __name__ == "__main__":
    main()
