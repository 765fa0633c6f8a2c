"""Time to first token and time per output token: TOKENSELECT against vLLM's own CPU attention.

    python -m benchmarks.serve --json benchmarks/results/serve-cpu.json
    python -m benchmarks.serve --lengths 32768 --also '{"similarity_threshold": 1}'

Starts all servers, one after the other, and asks them in turn, A B A B, so that what else happens on
the machine falls on all of them; one that is not asked waits and computes nothing. Prompts are real text.
Time to first token is that of a new prompt, which no prefix cache helps. Time per output token is
measured again and again with the same prompt, whose prefill the cache then spares. SmolLM2 was trained for
8,192 tokens: beyond that only the speed means anything, what it says does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

from tests.prometheus import metric
from vllm_tokenselect.cli.model import ensure_smollm2
from vllm_tokenselect.cli.server import VllmServer
from vllm_tokenselect.evaluation.text import document

BASE, OWN = "CPU_ATTN", "TOKENSELECT"
SHORT_PROMPT = 4096
PAUSE_S = 1.0  # a server's threads spin a moment after their work; it is not the other's to pay
THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True)
class Contender:
    """A server that is measured; `settings` are TokenSelect's, None for vLLM's own attention."""

    name: str
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sample:
    """One request."""

    contender: str
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
        "--also",
        type=json.loads,
        action="append",
        default=[],
        help="further settings beside these, JSON, for one more server; may be repeated",
    )
    parser.add_argument(
        "--threads-bind", help="cores of all servers, as for VLLM_CPU_OMP_THREADS_BIND: 0,1"
    )
    parser.add_argument("--json", type=Path, help="write every sample and the summary here")
    return parser.parse_args()


def contenders(args: argparse.Namespace) -> list[Contender]:
    also = [Contender(f"{OWN} {json.dumps(x)}", {**args.settings, **x}) for x in args.also]
    return [Contender(BASE), Contender(OWN, args.settings), *also]


def server(contender: Contender, args: argparse.Namespace, model: Path) -> VllmServer:
    longest = max(args.lengths) + args.output_tokens + 64
    return VllmServer(
        model,
        backend=BASE if contender.settings is None else OWN,
        settings=contender.settings,
        extra_args=[
            *("--dtype", args.dtype, "--max-model-len", str(longest), "--max-num-seqs", "4"),
            *("--max-num-batched-tokens", "2048", "--block-size", "128"),
            *("--hf-overrides", json.dumps({"max_position_embeddings": longest})),
        ],
        env={THREADS_BIND: args.threads_bind} if args.threads_bind else None,
    )


def new_prompt(tokenizer: Any, seed: int, length: int) -> list[int]:
    """Tokens of a text that begins as no other does: the prefix cache must not help."""
    title: list[int] = tokenizer.encode(f"Document {seed}\n\n", add_special_tokens=False)
    return [*title, *document(tokenizer, seed, length - len(title))]


def measure(
    started: VllmServer, prompt: list[int], args: argparse.Namespace
) -> tuple[float, float]:
    """Time to first token in s and time per further token in ms, of one streamed request."""
    client = OpenAI(base_url=f"{started.base_url}/v1", api_key="none", timeout=3600, max_retries=0)
    begun = time.perf_counter()
    arrivals = []
    stream = client.completions.create(
        model=started.model,
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


def reused_rows(started: VllmServer) -> float:
    """Rows that reused a selection, since the server started."""
    with urllib.request.urlopen(f"{started.base_url}/metrics", timeout=30) as page:
        return metric(page.read().decode(), "vllm:tokenselect_rows_total", kind="reused")


def run(args: argparse.Namespace, model: Path) -> tuple[list[Sample], dict[tuple[str, int], float]]:
    """Samples, and by contender and length the share of generated tokens' selections that were reused."""
    samples, reuse = [], {}
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 10**9  # its warning about long texts is known
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    measured = contenders(args)
    rounds = {n: args.short_rounds if n <= SHORT_PROMPT else args.rounds for n in args.lengths}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress, ExitStack() as servers:
        total = len(measured) * args.decodings * sum(rounds.values())
        task = progress.add_task("starting", total=total)
        started = {}
        for contender in measured:
            name = contender.name
            progress.update(task, description=f"{name}: starting the server")
            started[name] = servers.enter_context(server(contender, args, model))
            measure(started[name], new_prompt(tokenizer, 0, 300), args)  # warm-up
        for length in args.lengths:
            before = {
                c.name: reused_rows(started[c.name]) for c in measured if c.settings is not None
            }
            for round_number in range(rounds[length]):
                prompt = new_prompt(tokenizer, 1000 * length + round_number, length)
                for decoding in range(args.decodings):
                    for name in started:
                        progress.update(task, description=f"{name}: {length} tokens")
                        time.sleep(PAUSE_S)
                        with PeakMemory(started[name].pid) as memory:
                            ttft, tpot = measure(started[name], prompt, args)
                        samples.append(
                            Sample(
                                name,
                                round_number,
                                length,
                                None if decoding else ttft,
                                tpot,
                                memory.peak_mib,
                            )
                        )
                        progress.advance(task)
            time.sleep(PAUSE_S)
            rows = layers * (args.output_tokens - 1) * args.decodings * rounds[length]
            for name, reused in before.items():
                reuse[name, length] = (reused_rows(started[name]) - reused) / rows
    return samples, reuse


def summarise(
    samples: list[Sample], reuse: dict[tuple[str, int], float], lengths: list[int]
) -> list[dict]:
    names = list(dict.fromkeys(sample.contender for sample in samples))
    rows = []
    for length in lengths:
        row: dict = {
            "prompt_tokens": length,
            "reused": {name: reuse[name, length] for name in names if (name, length) in reuse},
        }
        for name in ("ttft_s", "tpot_ms", "worker_rss_mib"):
            # What a server needs of memory is the most that it ever had.
            summary = max if name == "worker_rss_mib" else statistics.median
            values = {
                contender: [
                    getattr(s, name)
                    for s in samples
                    if s.contender == contender
                    and s.prompt_tokens == length
                    and getattr(s, name) is not None
                ]
                for contender in names
            }
            row[name] = {
                contender: {"median": statistics.median(v), "min": min(v), "max": max(v)}
                for contender, v in values.items()
            }
            row[f"{name}_ratio"] = {
                contender: summary(values[BASE]) / summary(v)
                for contender, v in values.items()
                if contender != BASE
            }
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    table = Table(
        title="median (min to max); ratio = CPU_ATTN / TOKENSELECT of medians, of memory's maxima: "
        "above 1 is faster or smaller"
    )
    table.add_column("prompt", justify="right")
    table.add_column("")
    for column in ("TTFT s", "per token ms", "worker MiB"):
        table.add_column(column, justify="right")
        table.add_column("ratio", justify="right")
    table.add_column("reused", justify="right")
    for row in rows:
        for contender in row["ttft_s"]:
            cells = [f"{row['prompt_tokens']:,}", contender]
            for name, digits in (("ttft_s", 2), ("tpot_ms", 1), ("worker_rss_mib", 0)):
                v = row[name][contender]
                cells.append(
                    f"{v['median']:.{digits}f} ({v['min']:.{digits}f} to {v['max']:.{digits}f})"
                )
                ratio = row[f"{name}_ratio"].get(contender)
                cells.append("" if ratio is None else f"{ratio:.2f}x")
            reused = row["reused"].get(contender)
            cells.append("" if reused is None else f"{100 * reused:.0f} %")
            table.add_row(*cells)
    Console(width=190).print(table)


def main() -> None:
    args = arguments()
    model = args.model or ensure_smollm2()
    samples, reuse = run(args, model)
    rows = summarise(samples, reuse, args.lengths)
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
