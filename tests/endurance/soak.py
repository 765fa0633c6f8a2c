"""A real server under random load: nothing leaks, nobody is harmed, the answers stay right.

    python -m tests.endurance.soak --minutes 15 --json soak.json

Requests of all lengths, settings and fates come at random: answered whole, streamed and left in the
middle, refused for bad settings, preempted by a KV cache that is too small for all of them. Among them,
all the time, prompts whose answers are known. At the end the server must hold as many requests at once
as it ever could, know nobody any more, and use no more memory than after its first minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from transformers import AutoTokenizer

from tests.endurance.requests import (
    ROUNDING,
    Answer,
    Prompt,
    complete,
    complete_all,
    random_length,
    session_of,
)
from tests.oracle.cases import CACHED_SETTINGS
from tests.oracle.prompts import prompt_tokens
from tests.prometheus import metric
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

MAX_NUM_SEQS, CLIENTS, BLOCK_SIZE, BLOCKS = 16, 24, 128, 60
LEAST, MOST = 20, 3000
BAD_XARGS = ({"tokenselect": "maybe"}, {"tokenselect_top_k": 0}, {"tokenselect_budget": 3})
# oneDNN keeps a compiled product for every number of tokens that a step has had, up to 1,024 of them:
# hundreds of MiB within hours, on any attention backend, in which a leak of ours would not be seen.
NO_PRIMITIVES_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
OWN_XARGS = ({"tokenselect": "off"}, {"tokenselect_top_k": 50}, {"tokenselect_top_k": 200})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args()


class Soak:
    """The load, and what is found under it."""

    def __init__(self, started: VllmServer, tokenizer: Any, seed: int) -> None:
        self.started, self.tokenizer, self.seed = started, tokenizer, seed
        self.seeds = iter(range(20_000 + 10_000 * seed, 10**9))
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[dict[str, int]] = []
        rng = random.Random(seed)
        self.known = [
            self.prompt(rng, max_tokens=24, xargs=xargs) for xargs in ({}, {}, {}, *OWN_XARGS)
        ]
        self.expected: list[Answer] = []

    def prompt(self, rng: random.Random, max_tokens: int, xargs: dict[str, Any]) -> Prompt:
        length = random_length(rng, LEAST, MOST)
        return Prompt(
            tuple(prompt_tokens(self.tokenizer, next(self.seeds), max(length, 40))),
            max_tokens,
            xargs,
        )

    async def run(self, minutes: float) -> None:
        self.expected = [(await self.ask([prompt], 1))[0] for prompt in self.known]
        self.check("known answers, again", await self.ask(self.known, 1))
        begun = time.monotonic()
        deadline = begun + 60 * minutes
        watching = asyncio.create_task(self.watch())
        await asyncio.gather(*(self.client(number, deadline) for number in range(CLIENTS)))
        watching.cancel()
        self.check("known answers after all", await self.ask(self.known, 1))
        # Every slot is still there: as many at once as the server may hold, all of them long.
        crowd = [replace(self.known[0], max_tokens=64)] * MAX_NUM_SEQS
        answers = await self.ask(crowd, MAX_NUM_SEQS)
        self.check("a full house", [replace_tokens(a, 24) for a in answers], [0] * MAX_NUM_SEQS)

    async def ask(self, prompts: list[Prompt], concurrent: int) -> list[Answer]:
        return await complete_all(self.started.base_url, self.started.model, prompts, concurrent)

    def check(self, when: str, answers: list[Answer], which: list[int] | None = None) -> None:
        for index, answer in zip(which or range(len(answers)), answers, strict=True):
            found = self.expected[index].difference(answer)
            self.seen["known answers"] += 1
            if found is not None and found[1] >= ROUNDING:
                self.wrong.append(f"{when}: prompt {index}: {found[0]}, lead {found[1]:.5f}")
            elif found is not None:
                self.seen["known answers, ties"] += 1

    async def client(self, number: int, deadline: float) -> None:
        rng = random.Random(1000 * self.seed + number)
        kinds = (self.answered, self.left, self.refused, self.probe)
        async with session_of(self.started.base_url) as session:
            while time.monotonic() < deadline:
                kind = rng.choices(kinds, weights=(5, 4, 1, 2))[0]
                await kind(session, rng)
                await asyncio.sleep(rng.expovariate(1.0))

    async def answered(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        xargs = rng.choice(({}, {}, *OWN_XARGS))
        prompt = self.prompt(rng, rng.randint(1, 100), xargs)
        answer = await complete(session, self.started.model, prompt)
        self.seen["answered"] += 1
        if len(answer.tokens) != prompt.max_tokens:
            self.wrong.append(f"{len(answer.tokens)} tokens instead of {prompt.max_tokens}")

    async def left(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        body = self.prompt(rng, rng.randint(20, 200), {}).body(self.started.model)
        body["stream"] = True
        with_patience = asyncio.timeout(rng.expovariate(0.5))
        try:
            async with with_patience, session.post("/v1/completions", json=body) as response:
                await response.read()
            self.seen["streamed to the end"] += 1
        except TimeoutError:
            self.seen["left by its client"] += 1

    async def refused(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        prompt = self.prompt(rng, 5, rng.choice(BAD_XARGS))
        async with session.post(
            "/v1/completions", json=prompt.body(self.started.model)
        ) as response:
            self.seen["refused"] += 1
            if response.status != 400:
                self.wrong.append(f"{prompt.xargs} was answered with HTTP {response.status}")

    async def probe(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        index = rng.randrange(len(self.known))
        answer = await complete(session, self.started.model, self.known[index])
        self.check("under load", [answer], [index])

    async def watch(self) -> None:
        """The memory of each of the server's processes, MiB, every ten seconds."""
        root = psutil.Process(self.started.pid)
        while True:
            used = {"API server": round(root.memory_info().rss / 2**20)}
            for process in root.children(recursive=True):
                with suppress(psutil.NoSuchProcess, IndexError):  # it is just ending
                    name = process.cmdline()[0].split("/")[-1]
                    used[name] = used.get(name, 0) + round(process.memory_info().rss / 2**20)
            self.memory.append(used)
            await asyncio.sleep(10)

    async def metrics(self) -> str:
        async with session_of(self.started.base_url) as session, session.get("/metrics") as page:
            return await page.text()


def replace_tokens(answer: Answer, count: int) -> Answer:
    """The first tokens of an answer."""
    return Answer(answer.tokens[:count], answer.leads[:count])


def report_of(soak: Soak, metrics: str) -> dict[str, Any]:
    megabytes = [sum(used.values()) for used in soak.memory]
    third = max(len(megabytes) // 3, 1)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": dict(soak.seen),
        "preemptions": metric(metrics, "vllm:num_preemptions_total"),
        "rows": {
            kind: metric(metrics, "vllm:tokenselect_rows_total", kind=kind)
            for kind in ("reselected", "reused", "dense")
        },
        "memory of all processes, MiB": {
            "most in the second third": max(megabytes[third : 2 * third], default=0),
            "most in the last third": max(megabytes[2 * third :], default=0),
            "once a minute": soak.memory[::6],
        },
        "wrong": list(soak.wrong),
    }
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if metric(metrics, name):
            report["wrong"].append(f"{name} is {metric(metrics, name)} at the end")
    if not report["preemptions"]:
        report["wrong"].append("nothing was preempted: the load was too light")
    second, last, _ = report["memory of all processes, MiB"].values()
    if last > 1.03 * second:
        report["wrong"].append(f"memory grew from {second} to {last} MiB")
    return report


def main() -> None:
    args = arguments()
    model = ensure_smollm2()
    extra = ["--dtype", "float32", "--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", "4096"]
    extra += ["--max-num-batched-tokens", "700", "--block-size", str(BLOCK_SIZE)]
    extra += ["--num-gpu-blocks-override", str(BLOCKS)]
    with VllmServer(
        model, settings=asdict(CACHED_SETTINGS), extra_args=extra, env=NO_PRIMITIVES_KEPT
    ) as started:
        soak = Soak(started, AutoTokenizer.from_pretrained(model), args.seed)
        asyncio.run(soak.run(args.minutes))
        time.sleep(2)  # the counters are published once a second
        report = report_of(soak, asyncio.run(soak.metrics()))
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
