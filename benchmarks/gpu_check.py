"""Every check and benchmark that wants a GPU, in one command: `make gpu-check`.

    python -m benchmarks.gpu_check --json benchmarks/results/gpu-check.json

Each step is a process with a share of the time, so that one that crashes or hangs takes nothing else
with it. Needs torch and Triton; with vLLM (0.32 or 0.33) its engine and its FlashAttention are checked
too, with pytest the tests of the kernels. Ends with a line for every step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.device import environment

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A module to run, with its share of the time in seconds."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    needs: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    verdict: str  # pass, FAIL or skipped
    seconds: float
    output: str


def steps(results: Path) -> list[Step]:
    attention = ("-m", "benchmarks.attention", "--rounds", "5")
    layers = ("--json", str(results / "attention-gpu.json"), "--plots", str(results))
    return [
        Step("kernels against their definitions", ("-m", "benchmarks.gpu_kernels"), 120),
        Step("ways to select", ("-m", "benchmarks.topk"), 30),
        Step("a whole engine", ("-m", "benchmarks.gpu_engine"), 240, needs="vllm"),
        Step("attention of a layer", (*attention, *_with_plots(layers)), 210),
        Step(
            "tests of kernels and steps",
            (
                "-m",
                "pytest",
                "-q",
                "-x",
                "tests/gpu",
                "tests/kernels_gpu",
                "--deselect",
                "tests/kernels_gpu/test_compiles.py",
            ),
            120,
            needs="pytest",
        ),
    ]


def _with_plots(layers: tuple[str, ...]) -> tuple[str, ...]:
    return layers if find_spec("matplotlib") else layers[:2]


def run(step: Step, seconds_left: float) -> Outcome:
    """Run a step with its output shown as it comes."""
    print(f"\n== {step.name}", flush=True)
    if step.needs and not find_spec(step.needs):
        return Outcome(step.name, "skipped", 0.0, f"{step.needs} is not installed")
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = min(step.seconds, seconds_left)
    try:
        output, _ = process.communicate(timeout=max(limit, 1))
        verdict = "FAIL" if process.returncode else "pass"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        verdict, output = "FAIL", f"{output}\nstopped after {limit:.0f} s"
    print(output, flush=True)
    return Outcome(step.name, verdict, time.monotonic() - begun, output)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/gpu-check.json")
    parser.add_argument("--limit", type=float, default=590, help="seconds in all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here. Without one, `make test` runs the kernels in Triton's interpreter.")
        return 1
    found = environment()
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.limit
    outcomes = []
    for step in steps(args.json.parent):
        outcomes.append(run(step, end - time.monotonic()))
        report = {"environment": found, "steps": [asdict(outcome) for outcome in outcomes]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n== summary")
    for outcome in outcomes:
        reason = f" ({outcome.output})" if outcome.verdict == "skipped" else ""
        print(f"{outcome.verdict:8}{outcome.seconds:6.0f} s  {outcome.name}{reason}")
    return 1 if any(outcome.verdict == "FAIL" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
