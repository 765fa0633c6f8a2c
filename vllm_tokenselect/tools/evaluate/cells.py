"""Results on disk, cell by cell, so that a run can be stopped and continued."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """The smallest result that is kept: one method on one text.

    Attributes:
        method: the server, or the way of attending.
        length: tokens of the prompts.
        number: of the text; it is also its seed.
        depth: where something is hidden, 0 to 1; None in tasks that do not choose a depth.
    """

    method: str
    task: str
    length: int
    number: int
    depth: float | None = None


class CannotResume(ValueError):
    """The file is of another run. The message says what differs."""


class CellFile:
    """The file of the cells that are done; it is written after each cell.

    Args:
        path: of the JSON file; None writes nothing.
        fixed: what all cells have in common, such as model and settings.
        resume: continue the run that the file holds.
        run: what the reader must know of this run, such as its command, machine and versions.

    Raises:
        CannotResume: when the file exists and is not to be resumed, or was made with something else fixed.
    """

    def __init__(
        self, path: Path | None, fixed: dict[str, Any], resume: bool, run: dict[str, Any]
    ) -> None:
        self._path = path
        self._fixed = fixed
        self._runs: list[dict[str, Any]] = []
        self._done: dict[Cell, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path, resume)
        self._runs.append(run)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._done

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The cells that are done, each with its result."""
        return [asdict(cell) | result for cell, result in self._done.items()]

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep the result of a cell, and write the file."""
        self._done[cell] = result
        self.write([])

    def write(self, summary: list[dict[str, Any]]) -> None:
        """Replace the file in one step: a run may be killed at any moment."""
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
            raise CannotResume(f"{path} exists: continue it with --resume, or remove it")
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
