"""Attention of one layer on a GPU: TokenSelect, stage by stage, against full attention by others.

    python -m benchmarks.attention --json benchmarks/results/attention-gpu.json --plots benchmarks/results
    python -m benchmarks.attention --contexts 131072 --batches 8          # a part of it, for a look

It needs torch and Triton. FlashAttention 3 and vLLM's Triton attention are compared where vLLM is
installed. "reselect" is a layer whose rows all select, without a Selection Cache. "attend" is its last
stage alone. The roofline counts what must be read once and computed once, at the rates of a large copy
and a large matrix product measured in the same run. Without a GPU the kernels run in Triton's
interpreter: try a short context (`--contexts 4096`) to see that the script works. Its times then mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import (
    Ceilings,
    Stopwatch,
    Timing,
    environment,
    measure_ceilings,
    use_interpreter_without_gpu,
)

DEVICE = use_interpreter_without_gpu()  # before Triton is imported

from benchmarks.attention.baselines import BASELINES, Unavailable, flash_varlen  # noqa: E402
from benchmarks.attention.cases import (  # noqa: E402
    PREFILL_QUERIES,
    SHAPES,
    Data,
    Shape,
    TokenSelectLayer,
    Work,
)
from vllm_tokenselect.method.settings import Method  # noqa: E402
from vllm_tokenselect.tools.common.files import write_json  # noqa: E402

K = 1024
TARGETS = (
    # name, kind of step, context, which time, least ratio to FA3
    ("prefill step at 1M", f"prefill {PREFILL_QUERIES}", 1024 * K, "reselect", 25.0),
    ("prefill step at 128K", f"prefill {PREFILL_QUERIES}", 128 * K, "reselect", 4.0),
    ("decoding at 128K, batch 8", "decode 8", 128 * K, "reselect", 1.5),
    ("decoding at 128K, batch 8, selection reused", "decode 8", 128 * K, "attend", 8.0),
    ("decoding at 4K, batch 8", "decode 8", 4 * K, "reselect", 0.95),
)
LEAST_COPY_SHARE = 0.7  # of the copy's bandwidth, by the scores of a decoding step


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    lengths = [4 * K, 8 * K, 32 * K, 128 * K, 512 * K, 1024 * K]
    parser.add_argument("--contexts", type=int, nargs="+", default=lengths, help="tokens")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 32], help="requests of a decoding step"
    )
    parser.add_argument(
        "--prefill",
        type=int,
        default=PREFILL_QUERIES,
        help="queries of a prefill step; 0 leaves it out",
    )
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--baselines", nargs="*", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON: TokenSelect's settings"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument(
        "--cache-gib", type=float, default=24, help="memory that a KV cache may take"
    )
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    parser.add_argument(
        "--plots", type=Path, help="draw pictures into this folder, with matplotlib"
    )
    return parser.parse_args(argv)


def works(args: argparse.Namespace) -> Iterator[Work]:
    chosen: list[Shape] = [shape for shape in SHAPES if shape.name in args.shapes]
    for shape in chosen:
        for context in args.contexts:
            for batch in args.batches:
                yield Work(shape, context, batch, 1)
            if 0 < args.prefill <= context:
                yield Work(shape, context, 1, args.prefill)


def measure(work: Work, args: argparse.Namespace, ceilings: Ceilings) -> dict[str, Any]:
    """Times of one step in microseconds, with bytes, operations and rooflines."""
    data = Data(work, DEVICE, int(args.cache_gib * 2**30))
    try:
        varlen = flash_varlen()
    except Unavailable:
        varlen = None
    layer = TokenSelectLayer(data, Method(**args.settings), varlen)
    layer.run(0)  # every stage alone then finds what the one before it leaves
    calls = {"reselect": layer.run, **layer.stages()}
    unavailable = {}
    for name in args.baselines:
        try:
            call = BASELINES[name](data)
            call(0)
            calls[name] = call
        except (Unavailable, RuntimeError, torch.OutOfMemoryError) as error:
            unavailable[name] = str(error).splitlines()[0]
    turns = 1 if work.full_flops > 1e13 else max(data.copies, 2)
    times = Stopwatch(args.rounds, turns).compare(calls)
    rooflines = {
        "reselect": ceilings.roofline_us(layer.score_bytes + layer.attend_bytes, layer.flops),
        "score": ceilings.roofline_us(layer.score_bytes, 0),
        "attend": ceilings.roofline_us(layer.attend_bytes, 0),
        "full attention": ceilings.roofline_us(work.full_bytes, work.full_flops),
    }
    return {
        "shape": work.shape.name,
        "context": work.context,
        "step": work.name,
        "attention": layer.attention.name,
        "us": {name: asdict(timing) for name, timing in times.items()},
        "ratio_to": ratios(times, args.baselines),
        "unavailable": unavailable,
        "bytes": {
            "score": layer.score_bytes,
            "attend": layer.attend_bytes,
            "full attention": work.full_bytes,
        },
        "flops": {"reselect": layer.flops, "full attention": work.full_flops},
        "roofline_us": rooflines,
        "roofline_share": {
            name: rooflines[name] / times[name].median_us
            for name in ("reselect", "score", "attend")
        },
    }


def ratios(times: dict[str, Timing], baselines: list[str]) -> dict[str, dict[str, float]]:
    """How many times faster than each baseline: a layer that reselects, and one that only attends."""
    return {
        name: {own: times[name].median_us / times[own].median_us for own in ("reselect", "attend")}
        for name in baselines
        if name in times
    }


def judge(results: list[dict[str, Any]]) -> list[tuple[str, str, float, float, bool]]:
    """Each target with its shape, least value, value and whether it is met."""
    verdicts = []
    for result in results:
        for name, step, context, own, least in TARGETS:
            if (result["step"], result["context"]) == (step, context) and "FA3" in result[
                "ratio_to"
            ]:
                value = result["ratio_to"]["FA3"][own]
                verdicts.append(
                    (f"{name}, against FA3", result["shape"], least, value, value >= least)
                )
        if result["step"] == "decode 8" and result["context"] == 128 * K:
            share = result["roofline_share"]["score"]
            verdicts.append(
                (
                    "scores, share of the copy's bandwidth",
                    result["shape"],
                    LEAST_COPY_SHARE,
                    share,
                    share >= LEAST_COPY_SHARE,
                )
            )
    return verdicts


def line(result: dict[str, Any]) -> str:
    us = {name: timing["median_us"] for name, timing in result["us"].items()}
    stages = " + ".join(f"{us[name]:.0f}" for name in ("score", "vote", "select", "attend"))
    others = "  ".join(
        f"{name} {us[name]:.0f} ({ratio['reselect']:.2f}x, attend {ratio['attend']:.2f}x)"
        for name, ratio in result["ratio_to"].items()
    )
    return (
        f"{result['shape']:13} {result['context'] // K:5}K {result['step']:13} "
        f"{us['reselect']:9.0f} us = {stages:28} "
        f"roofline {result['roofline_share']['reselect']:4.0%}, "
        f"scores {result['roofline_share']['score']:4.0%}  {others}"
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report: dict[str, Any] = {"environment": environment()}
    report["arguments"] = {key: str(value) for key, value in vars(args).items()}
    ceilings = measure_ceilings(DEVICE)
    report["ceilings"] = asdict(ceilings)
    print(
        f"{report['environment']['gpu']}: {ceilings}\n"
        "shape, context, step: TokenSelect = score + vote + select + attend; others (times faster)"
    )
    report["results"] = results = []
    for work in works(args):
        results.append(measure(work, args, ceilings))
        print(line(results[-1]), flush=True)
        write_json(args.json, report)
    missing = {name: why for result in results for name, why in result["unavailable"].items()}
    for name, why in missing.items():
        print(f"not measured: {name}: {why}")
    verdicts = judge(results)
    for name, shape, least, value, met in verdicts:
        print(f"{'met ' if met else 'LOST'} {name} ({shape}): {value:.2f}, target {least}")
    if args.plots:
        from benchmarks.attention.plots import draw

        draw(report, args.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
