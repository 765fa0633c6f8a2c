"""What a request is answered depends on the request alone.

    python -m tests.endurance.invariance --requests 200 --json invariance.json

The same prompts, of 100 to 6,000 tokens, to one server after another: alone, again (a prefix-cache hit),
among 16 others under several step budgets, and with a KV cache so small that requests are preempted.
Every answer is compared with the one that its prompt got alone. Where they part at two tokens that were
equally likely but for rounding it is counted as a tie, anything else is a difference and fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.endurance.requests import (
    ROUNDING,
    Answer,
    Prompt,
    complete_all,
    random_length,
)
from tests.oracle.cases import CACHED_SETTINGS
from tests.oracle.prompts import prompt_tokens
from tests.prometheus import metric
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

CONCURRENT, BLOCK_SIZE, LEAST, MOST = 16, 128, 100, 6000
BUDGETS = (300, 700, 2048)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="further tokenselect settings, JSON"
    )
    parser.add_argument(
        "--ways", nargs="+", default=["alone", *map(str, BUDGETS), "preempted"], help="in order"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args()


def make_prompts(model: Path, args: argparse.Namespace) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(args.seed)
    lengths = [random_length(rng, LEAST, MOST) for _ in range(args.requests)]
    # Every other one is a few tokens short of whole blocks, and needs another while it generates: so
    # requests run out of blocks after they were let in.
    lengths[::2] = [max(n // BLOCK_SIZE, 1) * BLOCK_SIZE - 8 for n in lengths[::2]]
    return [
        Prompt(tuple(prompt_tokens(tokenizer, 10_000 + seed, length)), args.max_tokens)
        for seed, length in enumerate(lengths)
    ]


def server(model: Path, settings: dict[str, Any], budget: int, blocks: int | None) -> VllmServer:
    extra = ["--dtype", "float32", "--max-num-seqs", str(CONCURRENT), "--max-model-len", "6144"]
    extra += ["--max-num-batched-tokens", str(budget), "--block-size", str(BLOCK_SIZE)]
    if blocks:
        extra += ["--num-gpu-blocks-override", str(blocks)]
    return VllmServer(model, settings=settings, extra_args=extra)


def ask(started: VllmServer, prompts: Sequence[Prompt], concurrent: int) -> list[Answer]:
    return asyncio.run(complete_all(started.base_url, started.model, prompts, concurrent))


def compare(
    way: str, expected: list[Answer], answers: list[Answer], prompts: list[Prompt]
) -> dict[str, Any]:
    ties, differences = [], []
    for index, (own, other) in enumerate(zip(expected, answers, strict=True)):
        found = own.difference(other)
        if found is not None:
            where, lead = found
            entry = (
                f"request {index} ({len(prompts[index].tokens)} tokens): {where}, lead {lead:.5f}"
            )
            (ties if lead < ROUNDING else differences).append(entry)
    same = len(answers) - len(ties) - len(differences)
    return {"way": way, "same": same, "ties": ties, "differences": differences}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = ensure_smollm2()
    settings = {**asdict(CACHED_SETTINGS), **args.settings}
    prompts = make_prompts(model, args)
    expected: list[Answer] = []
    report = []

    def record(way: str, started: VllmServer, answers: list[Answer], begun: float) -> None:
        with urllib.request.urlopen(f"{started.base_url}/metrics") as page:
            metrics = page.read().decode()
        found = compare(way, expected, answers, prompts)
        found["seconds"] = round(time.monotonic() - begun)
        for name in (
            "vllm:prefix_cache_hits_total",
            "vllm:num_preemptions_total",
            "vllm:tokenselect_rows_total",
        ):
            found[name] = metric(metrics, name)
        found["of these reused"] = metric(metrics, "vllm:tokenselect_rows_total", kind="reused")
        report.append(found)
        print(json.dumps(found), flush=True)

    for way in args.ways:
        begun = time.monotonic()
        if way == "alone":
            with server(model, settings, 2048, None) as started:
                again = []
                for prompt in prompts:
                    expected += ask(started, [prompt], 1)
                    again += ask(started, [prompt], 1)
                record("alone, sent again", started, again, begun)
        elif way == "preempted":
            # As many blocks as the longest prompt needs, and vLLM's own.
            blocks = -(-(MOST + args.max_tokens) // BLOCK_SIZE) + 2
            with server(model, settings, 700, blocks) as started:
                record(way, started, ask(started, prompts, CONCURRENT), begun)
                if not report[-1]["vllm:num_preemptions_total"]:
                    report[-1]["differences"].append("nothing was preempted")
        else:
            with server(model, settings, int(way), None) as started:
                record(f"budget {way}", started, ask(started, prompts, CONCURRENT), begun)
    return report


def main() -> None:
    args = arguments()
    report = run(args)
    if args.json:
        whole = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "settings": {**asdict(CACHED_SETTINGS), **args.settings},
            "ways": report,
        }
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    different = sum(len(way["differences"]) for way in report)
    print(f"{sum(way['same'] for way in report)} answers the same, {different} different")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
