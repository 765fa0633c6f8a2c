"""The steps of `make gpu-check`, the most valuable first."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A command with its share of the time.

    Attributes:
        seconds: after which it is killed.
        modules: that must be installed; without them the step is skipped.
        program: in front of the command, skipped without it as well.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    modules: tuple[str, ...] = ()
    program: str | None = None

    @property
    def command(self) -> list[str]:
        start = [] if self.program is None else [self.program]
        return [*start, sys.executable, *self.arguments]

    @property
    def missing(self) -> list[str]:
        """What the step needs and this machine does not have."""
        modules = [name for name in self.modules if find_spec(name) is None]
        has_program = self.program is None or shutil.which(self.program) is not None
        return modules if has_program else [*modules, str(self.program)]


# No plugin is assumed, nor what `tests/conftest.py` imports. Each outcome is written as it comes, and a
# file that cannot be imported here keeps no other from being run.
PYTEST = (
    *("-m", "pytest", "-v", "-s", "-rfE", "--noconftest", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "--continue-on-collection-errors"),
)
KERNELS = ("tests/gpu_device/test_kernels.py", "tests/gpu_device/test_layer.py")
ENGINES = "tests/gpu_device/test_engine.py"
FIRST = "Qwen2 and bf16 or table or graph"  # of the tests of kernels

# In the interpreter, where every number is as good as any other.
TINY = (
    *("--contexts", "1024", "--batches", "1", "--prefill", "0", "--shapes", "Qwen2-7B"),
    *("--rounds", "1", "--cache-gib", "0.1", "--baselines", "--settings"),
    '{"top_k": 128, "n_init": 16, "n_local": 32, "query_chunk": 128}',
)


def steps(results: Path, dry: bool = False) -> list[Step]:
    """All steps.

    Args:
        results: the folder for their files.
        dry: of a size for Triton's interpreter; what only a GPU can do is collected and not run.
    """
    first = (*PYTEST, "-m", "gpu", *KERNELS, *(() if dry else ("-k", FIRST)))
    rest = ("-m", "not endurance and not server", "tests/gpu_device", "tests/kernels_gpu")
    collect = ("--collect-only", "-q") if dry else ()
    found = [
        Step(
            "versions and ceilings",
            ("-m", "benchmarks.gpu.device", "--json", str(results / "device.json")),
            30,
        ),
        Step("first kernels", first, 60, ("pytest",)),
        Step(
            "first kernels, every access checked",
            (*first, *collect),
            60,
            ("pytest",),
            None if dry else "compute-sanitizer",
        ),
        Step(
            "attention at 128K",
            _attention(
                *(results / "attention-128k.json", dry),
                *("--contexts", "131072", "--batches", "1", "8", "--shapes", "Qwen2-7B"),
                *("--baselines", "FA3", "--rounds", "20"),
            ),
            120,
        ),
        Step(
            "ways to select",
            ("-m", "benchmarks.topk", "--json", str(results / "topk.json")),
            60,
        ),
        Step(
            "whole engines",
            (*PYTEST, "-m", "gpu", ENGINES, *collect),
            200,
            ("pytest", "vllm"),
        ),
        Step(
            "all other tests",
            (
                *(*PYTEST, *rest, "tests/gpu", "--ignore", ENGINES),
                *("--deselect", "tests/kernels_gpu/test_compiles.py", *collect),
            ),
            150,
            ("pytest",),
        ),
        Step(
            "attention from 4K to 1M",
            _attention(
                *(results / "attention-gpu.json", dry),
                *("--contexts", *(str(1024 * k) for k in (1024, 32, 512, 8, 4)), "--rounds", "5"),
            ),
            300,
        ),
    ]
    return [replace(step, seconds=math.inf) for step in found] if dry else found


def _attention(file: Path, dry: bool, *arguments: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.attention", *(TINY if dry else arguments), "--json", str(file))
