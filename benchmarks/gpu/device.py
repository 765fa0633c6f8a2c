"""The device under measurement: what it is, what it can do at most, and how long work takes on it.

python -m benchmarks.gpu.device --json device.json
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.provenance import now, versions

PACKAGES = ("torch", "triton", "vllm", "xformers")


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over all samples."""

    median_us: float
    min_us: float
    max_us: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples))


def environment() -> dict[str, Any]:
    """GPU, driver, versions and date, for a report."""
    found = {"date": now()}
    found |= {"python": platform.python_version()} | versions(PACKAGES)
    found["cuda"] = str(torch.version.cuda)
    if not torch.cuda.is_available():
        return found | {"gpu": "none: Triton interprets", "driver": "none"}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        driver = "unknown"
    return found | {
        "gpu": properties.name,
        "driver": driver,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


class Stopwatch:
    """Times calls side by side: every round takes one sample of each, so that drift falls on all.

    On a GPU the calls of one sample are replayed as a CUDA graph, without the host's part; a call that
    cannot be captured is launched from Python. A call gets the number of its turn, to take other data
    each time: what lies in the L2 cache would flatter it.

    Args:
        rounds: samples of each call.
        turns: calls of one sample.
    """

    def __init__(self, rounds: int, turns: int) -> None:
        self.rounds, self.turns = rounds, turns

    def compare(self, calls: dict[str, Callable[[int], object]]) -> dict[str, Timing]:
        samples: dict[str, list[float]] = {name: [] for name in calls}
        if not torch.cuda.is_available():
            for _ in range(self.rounds):
                for name, call in calls.items():
                    begun = time.perf_counter()
                    call(0)
                    samples[name].append(1e6 * (time.perf_counter() - begun))
            return {name: Timing.of(times) for name, times in samples.items()}
        replays = {name: self._replay(call) for name, call in calls.items()}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.rounds):
            for name, replay in replays.items():
                start.record()
                replay()
                end.record()
                end.synchronize()
                samples[name].append(1e3 * start.elapsed_time(end) / self.turns)
        return {name: Timing.of(times) for name, times in samples.items()}

    def _replay(self, call: Callable[[int], object]) -> Callable[[], object]:
        def all_turns() -> None:
            for turn in range(self.turns):
                call(turn)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and allocates what a library keeps
            all_turns()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                all_turns()
        except RuntimeError:
            torch.cuda.synchronize()
            return all_turns
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at most, measured: bytes moved and bf16 operations per microsecond."""

    bytes_per_us: float
    flops_per_us: float

    def __str__(self) -> str:
        copy, product = self.bytes_per_us / 1e6, self.flops_per_us / 1e6
        return f"copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s"

    def roofline_us(self, num_bytes: float, flops: float) -> float:
        """Least time of work that moves so many bytes and does so many operations."""
        return max(num_bytes / self.bytes_per_us, flops / self.flops_per_us)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A large copy, read and written bytes counted, and a large bf16 matrix product."""
    on_gpu = device.type == "cuda"
    source = torch.randint(255, (2**31 if on_gpu else 2**22,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = Stopwatch(rounds=5, turns=3).compare(
        {"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}
    )
    return Ceilings(
        2 * source.numel() / times["copy"].median_us, 2 * size**3 / times["product"].median_us
    )


def use_interpreter_without_gpu() -> torch.device:
    """The GPU, or the CPU with Triton's interpreter; call it before Triton is imported."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Say which GPU this is and what it can do.")
    parser.add_argument("--json", type=Path, required=True, help="write it to this file")
    file = parser.parse_args().json
    report: dict[str, Any] = {"environment": environment()}
    write_json(file, report)
    ceilings = measure_ceilings(use_interpreter_without_gpu())
    report["ceilings"] = asdict(ceilings)
    write_json(file, report)
    print(*(f"{name}: {value}" for name, value in report["environment"].items()), sep="\n")
    print(ceilings)


if __name__ == "__main__":
    main()
