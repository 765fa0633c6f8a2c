"""What was measured, on disk cell by cell so that a run can be stopped and continued, and its rates."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.table import Table

from benchmarks.device import environment
from benchmarks.serve import cpu_name


@dataclass(frozen=True)
class Cell:
    """The smallest thing that is measured, and kept: what one method makes of one text.

    Attributes:
        length: tokens of the prompts.
        number: of the text, and its seed.
        depth: where something is hidden, 0 to 1, in tasks that choose it.
    """

    method: str
    task: str
    length: int
    number: int
    depth: float | None = None


class CannotResume(ValueError):
    """The file is of another run. The message says what differs."""


class Report:
    """The cells that are done, on disk after each.

    Args:
        path: of the JSON file; None keeps nothing.
        fixed: what all cells have in common: the part, its model, settings and the like.
        resume: go on with what the file has.

    Raises:
        CannotResume: when the file exists and is not to be resumed, or was made with something else fixed.
    """

    def __init__(self, path: Path | None, fixed: dict[str, Any], resume: bool) -> None:
        self._path = path
        self._fixed = fixed
        self._runs: list[dict[str, Any]] = []
        self._done: dict[Cell, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path, resume)
        self._runs.append({"command": _command(), "environment": _environment()})

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._done

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The cells that are done, each with its result."""
        return [asdict(cell) | result for cell, result in self._done.items()]

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        self._done[cell] = result
        self.write([])

    def write(self, summary: list[dict[str, Any]]) -> None:
        """Write the file anew, all or nothing: a run may be killed at any moment."""
        if self._path is None:
            return
        head = {"fixed": self._fixed, "runs": self._runs, "summary": summary, "cells": []}
        text = json.dumps(head, indent=1).removesuffix("[]\n}")
        lines = ",\n".join(f"  {json.dumps(cell)}" for cell in self.cells)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(f"{text}[\n{lines}\n ]\n}}\n")
        new.replace(self._path)

    def _read(self, path: Path, resume: bool) -> None:
        if not resume:
            raise CannotResume(f"{path} exists: go on with it by --resume, or remove it")
        found = json.loads(path.read_text())
        fixed = json.loads(json.dumps(self._fixed))
        other = sorted(key for key in fixed if found["fixed"].get(key) != fixed[key])
        if other:
            was = ", ".join(f"{key} {found['fixed'].get(key)!r}" for key in other)
            raise CannotResume(f"{path} was made with another {' and '.join(other)}: {was}")
        self._runs = found["runs"]
        names = Cell.__dataclass_fields__
        for entry in found["cells"]:
            cell = Cell(**{name: entry.pop(name) for name in names})
            self._done[cell] = entry


def wilson(right: int, asked: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate, after Wilson 1927: right also for few questions and rates near 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = right / asked
    middle = rate + z * z / (2 * asked)
    half = z * sqrt(rate * (1 - rate) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    # Rounding must not put a rate of 0 or 1 outside its interval.
    return min(rate, (middle - half) / scale), max(rate, (middle + half) / scale)


def rates(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exact answers of each method at each task and length, with their interval.

    Args:
        cells: their `answers` say of each question whether it was answered right.
    """
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["length"], cell["method"]), []).append(cell)
    rows = []
    for (task, length, method), group in sorted(groups.items(), key=lambda group: group[0][:2]):
        answers = [answer["right"] for cell in group for answer in cell["answers"]]
        low, high = wilson(sum(answers), len(answers))
        rows.append(
            {
                "task": task,
                "length": length,
                "method": method,
                "right": sum(answers),
                "questions": len(answers),
                "haystacks": len(group),
                "rate": sum(answers) / len(answers),
                "low": low,
                "high": high,
                "seconds": sum(cell["seconds"] for cell in group),
            }
        )
    return rows


def rate_table(rows: list[dict[str, Any]]) -> Table:
    """Rates with their intervals, one row a task and length, one column a method."""
    table = Table(title="exact answers: right / asked, rate [95 % interval, Wilson]")
    table.add_column("task")
    table.add_column("tokens", justify="right")
    names = list(dict.fromkeys(row["method"] for row in rows))
    for name in names:
        table.add_column(name, justify="right")
    found = {(row["task"], row["length"], row["method"]): row for row in rows}
    for task, length in sorted({(row["task"], row["length"]) for row in rows}):
        shown = [found.get((task, length, name)) for name in names]
        table.add_row(task, f"{length:,}", *map(_rate, shown))
    return table


def _rate(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['right']}/{row['questions']}  {row['rate']:.2f} {interval}"


def _command() -> str:
    """The command as it is to be typed: of a module, Python says only its file."""
    name = Path(sys.argv[0])
    start = ["python", "-m", f"benchmarks.{name.stem}"] if name.suffix == ".py" else [str(name)]
    return shlex.join([*start, *sys.argv[1:]])


def _environment() -> dict[str, Any]:
    found = environment() | {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    for package in ("vllm-tokenselect", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
