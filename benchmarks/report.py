"""The report of a run: that of `tokenselect eval`, with the machine that the servers run on."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import environment
from vllm_tokenselect.tools.common.intervals import wilson
from vllm_tokenselect.tools.common.provenance import cpu_name, typed_command, versions
from vllm_tokenselect.tools.evaluate.cells import CannotResume, Cell, CellFile
from vllm_tokenselect.tools.evaluate.rates import rate_table, rates

__all__ = ["CannotResume", "Cell", "Report", "rate_table", "rates", "wilson"]


class Report(CellFile):
    """The cells that are done, on disk after each.

    Args:
        path: of the JSON file; None keeps nothing.
        fixed: what all cells have in common: the part, its model, settings and the like.
        resume: go on with what the file has.

    Raises:
        CannotResume: when the file exists and is not to be resumed, or was made with something else fixed.
    """

    def __init__(self, path: Path | None, fixed: dict[str, Any], resume: bool) -> None:
        run = {"command": _command(), "environment": _environment()}
        super().__init__(path, fixed, resume, run)


def _command() -> str:
    name = Path(sys.argv[0])
    start = ["python", "-m", f"benchmarks.{name.stem}"] if name.suffix == ".py" else [str(name)]
    return typed_command(start)


def _environment() -> dict[str, Any]:
    found = environment() | {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    found |= versions(("vllm-tokenselect", "transformers"))
    return found | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
