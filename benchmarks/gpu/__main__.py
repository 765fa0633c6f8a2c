"""Every check and measurement that wants a GPU, in ten minutes: `make gpu-check`.

    python -m benchmarks.gpu --results FOLDER
    python -m benchmarks.gpu --results FOLDER --dry

The most valuable steps come first. Each step is a process group of its own, with a limit of its own.
When it ends, or its time is over, the group is killed and the next step runs. The folder always has
what is known so far: `gpu-check.log`, all output line by line; `gpu-check.json`, a verdict for each
step; and the files of the measurements.

The steps need torch and Triton for the GPU, and some of them pytest and vLLM (0.32 or 0.33); a step
whose needs are missing is skipped. With --dry all steps run without a GPU, at sizes for Triton's
interpreter, and have as long as they take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.process import run_in_group
from benchmarks.gpu.steps import Step, steps

ROOT = Path(__file__).resolve().parents[2]
RUNNING = "running"  # the verdict of the step that a killed check was in


@dataclass(frozen=True)
class Outcome:
    """What became of a step: pass, FAIL, skipped or running."""

    name: str
    verdict: str
    seconds: float = 0.0
    reason: str = ""


def run_steps(todo: list[Step], results: Path, limit: float) -> list[Outcome]:
    """Run the steps in order until the time is over, with each verdict in `gpu-check.json` at once."""
    end = time.monotonic() + limit
    done: list[Outcome] = []
    for step in todo:
        write(results, [*done, Outcome(step.name, RUNNING)])
        done.append(run_step(step, results / "gpu-check.log", end - time.monotonic()))
        write(results, done)
    return done


def run_step(step: Step, log: Path, seconds_left: float) -> Outcome:
    if step.missing:
        return Outcome(step.name, "skipped", reason=f"not installed: {', '.join(step.missing)}")
    if seconds_left < 1:
        return Outcome(step.name, "skipped", reason="no time was left")
    with log.open("a") as file:
        file.write(f"\n== {step.name}\n")
    print(f"\n== {step.name}", flush=True)
    begun = time.monotonic()
    limit = min(step.seconds, seconds_left)
    status = run_in_group(step.command, log, limit, ROOT)
    seconds = round(time.monotonic() - begun, 1)
    if status is None:
        return Outcome(step.name, "FAIL", seconds, f"killed after {limit:.0f} s")
    if status:
        return Outcome(step.name, "FAIL", seconds, f"exit status {status}")
    return Outcome(step.name, "pass", seconds)


def write(results: Path, outcomes: list[Outcome]) -> None:
    report = {"steps": [asdict(outcome) for outcome in outcomes]}
    (results / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    folder = ROOT / "benchmarks/results/gpu"
    parser.add_argument("--results", type=Path, default=folder, help="folder for all results")
    parser.add_argument("--limit", type=float, default=590, help="seconds for all steps together")
    parser.add_argument("--dry", action="store_true", help="try every step without a GPU")
    args = parser.parse_args(argv)
    # A polite `kill` must not leave the step behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.dry:
        os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    elif not has_gpu():
        print("no GPU here. Without one, `make test` runs the kernels in Triton's interpreter.")
        return 1
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    limit = math.inf if args.dry else args.limit
    outcomes = run_steps(steps(results, args.dry), results, limit)
    print("\n== summary")
    for outcome in outcomes:
        reason = f" ({outcome.reason})" if outcome.reason else ""
        print(f"{outcome.verdict:8}{outcome.seconds:6.0f} s  {outcome.name}{reason}")
    return 1 if any(outcome.verdict == "FAIL" for outcome in outcomes) else 0


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
