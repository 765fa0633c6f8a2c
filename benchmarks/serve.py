"""Time to first token and time per output token: TOKENSELECT against vLLM's own CPU attention.

    python benchmarks/serve.py --json benchmarks/results/serve-cpu.json

Starts both servers, one after the other, and asks them in turn, A B A B, so that what else happens on
the machine falls on both; the one that is not asked waits and computes nothing. Time to first token is
that of a new prompt, which no prefix cache helps. Time per output token is measured again and again
with the same prompt, whose prefill the cache then spares. SmolLM2 was trained for 8,192 tokens: beyond
that only the speed means anything, what it says does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_tokenselect.cli.model import ensure_smollm2
from vllm_tokenselect.cli.server import VllmServer

BACKENDS = ("CPU_ATTN", "TOKENSELECT")
SHORT_PROMPT = 4096
PAUSE_S = 1.0  # a server's threads spin a moment after their work; it is not the other's to pay
THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True)
class Sample:
    """One request."""

    backend: str
    round: int
    prompt_tokens: int
    ttft_s: float | None  # None where the prefix cache had the prompt
    tpot_ms: float
    worker_rss_mib: float


class PeakMemory:
    """Largest resident memory of the server's largest process, sampled while it is entered."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            for process in self.root.children(recursive=True):
                try:
                    rss = process.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    continue
                self.peak_mib = max(self.peak_mib, rss)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=2, help="new prompts per length")
    parser.add_argument(
        "--short-rounds",
        type=int,
        default=4,
        help=f"the same up to {SHORT_PROMPT} tokens, where a prefill is over before noise evens out",
    )
    parser.add_argument("--decodings", type=int, default=4, help="generations per prompt")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="tokenselect settings, JSON"
    )
    parser.add_argument(
        "--threads-bind", help="cores of both servers, as for VLLM_CPU_OMP_THREADS_BIND: 0,1"
    )
    parser.add_argument("--json", type=Path, help="write every sample and the summary here")
    return parser.parse_args()


def server(backend: str, args: argparse.Namespace, model: Path) -> VllmServer:
    longest = max(args.lengths) + args.output_tokens + 64
    return VllmServer(
        model,
        backend=backend,
        settings=args.settings if backend == "TOKENSELECT" else None,
        extra_args=[
            *("--dtype", args.dtype, "--max-model-len", str(longest), "--max-num-seqs", "4"),
            *("--max-num-batched-tokens", "2048", "--block-size", "128"),
            *("--hf-overrides", json.dumps({"max_position_embeddings": longest})),
        ],
        env={THREADS_BIND: args.threads_bind} if args.threads_bind else None,
    )


def measure(
    started: VllmServer, model: Path, length: int, args: argparse.Namespace, seed: int
) -> tuple[float, float]:
    """Time to first token in s and time per further token in ms, of one streamed request."""
    rng = random.Random(seed)
    prompt = [rng.randrange(1000, 40000) for _ in range(length)]
    client = OpenAI(base_url=f"{started.base_url}/v1", api_key="none", timeout=3600, max_retries=0)
    begun = time.perf_counter()
    arrivals = []
    stream = client.completions.create(
        model=str(model),
        prompt=prompt,
        max_tokens=args.output_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in stream:
        arrivals.append(time.perf_counter())
    per_token = (arrivals[-1] - arrivals[0]) / (args.output_tokens - 1)
    return arrivals[0] - begun, 1000 * per_token


def run(args: argparse.Namespace, model: Path) -> list[Sample]:
    samples = []
    rounds = {n: args.short_rounds if n <= SHORT_PROMPT else args.rounds for n in args.lengths}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress, ExitStack() as servers:
        total = len(BACKENDS) * args.decodings * sum(rounds.values())
        task = progress.add_task("starting", total=total)
        started = {}
        for backend in BACKENDS:
            progress.update(task, description=f"{backend}: starting the server")
            started[backend] = servers.enter_context(server(backend, args, model))
            measure(started[backend], model, 300, args, seed=10**6)  # warm-up
        for length in args.lengths:
            for round_number in range(rounds[length]):
                for decoding in range(args.decodings):
                    for backend in BACKENDS:
                        progress.update(task, description=f"{backend}: {length} tokens")
                        time.sleep(PAUSE_S)
                        with PeakMemory(started[backend].pid) as memory:
                            ttft, tpot = measure(
                                started[backend], model, length, args, 1000 * length + round_number
                            )
                        samples.append(
                            Sample(
                                backend,
                                round_number,
                                length,
                                None if decoding else ttft,
                                tpot,
                                memory.peak_mib,
                            )
                        )
                        progress.advance(task)
    return samples


def summarise(samples: list[Sample], lengths: list[int]) -> list[dict]:
    rows = []
    for length in lengths:
        row: dict = {"prompt_tokens": length}
        for name in ("ttft_s", "tpot_ms", "worker_rss_mib"):
            # What a server needs of memory is the most that it ever had.
            summary = max if name == "worker_rss_mib" else statistics.median
            values = {
                backend: [
                    getattr(s, name)
                    for s in samples
                    if s.backend == backend
                    and s.prompt_tokens == length
                    and getattr(s, name) is not None
                ]
                for backend in BACKENDS
            }
            medians = {b: statistics.median(v) for b, v in values.items()}
            row[name] = {
                backend: {"median": medians[backend], "min": min(v), "max": max(v)}
                for backend, v in values.items()
            }
            row[f"{name}_ratio"] = summary(values["CPU_ATTN"]) / summary(values["TOKENSELECT"])
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    table = Table(
        title="median [min .. max]; ratio = CPU_ATTN / TOKENSELECT of medians, of memory's maxima: "
        "above 1 is faster or smaller"
    )
    table.add_column("prompt", justify="right")
    for name in ("TTFT s", "per token ms", "worker MiB"):
        for column in (f"{name} CPU_ATTN", "TOKENSELECT", "ratio"):
            table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['prompt_tokens']:,}"]
        for name, digits in (("ttft_s", 2), ("tpot_ms", 1), ("worker_rss_mib", 0)):
            for backend in BACKENDS:
                v = row[name][backend]
                cells.append(
                    f"{v['median']:.{digits}f} [{v['min']:.{digits}f} .. {v['max']:.{digits}f}]"
                )
            cells.append(f"{row[f'{name}_ratio']:.2f}x")
        table.add_row(*cells)
    Console(width=190).print(table)


def main() -> None:
    args = arguments()
    model = args.model or ensure_smollm2()
    samples = run(args, model)
    rows = summarise(samples, args.lengths)
    show(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
            "versions": {
                name: version(name) for name in ("vllm-tokenselect", "vllm", "torch", "numba")
            },
            "model": model.name,
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "summary": rows,
            "samples": [asdict(sample) for sample in samples],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
