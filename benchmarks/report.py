"""What all benchmarks on CPUs say of themselves: their command, the machine, versions and the date."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import environment
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.provenance import cpu_name, now, typed_command, versions
from vllm_tokenselect.tools.evaluate.cells import CellFile

SMOLLM2 = "SmolLM2-135M-Instruct, dequantized 4-bit checkpoint"


def open_cells(path: Path | None, fixed: dict[str, Any], resume: bool) -> CellFile:
    """The file of a run that is kept cell by cell; arguments and errors are those of `CellFile`."""
    module = Path(sys.argv[0]).parent.name  # of `benchmarks/MODULE/__main__.py`
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    described = environment() | machine | versions(("vllm-tokenselect", "transformers"))
    command = typed_command(["python", "-m", f"benchmarks.{module}"])
    return CellFile(path, fixed, resume, {"command": command, "environment": described})


def write_figures(path: Path | None, args: argparse.Namespace, **figures: Any) -> None:
    """Write what a benchmark of SmolLM2 in fp32 found, once it is done; None writes nothing."""
    report = {
        "date": now(),
        "model": f"{SMOLLM2}, fp32",
        "versions": versions(("vllm-tokenselect", "torch")),
        "python": platform.python_version(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        **figures,
    }
    write_json(path, report)
