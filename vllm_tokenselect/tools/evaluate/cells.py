"""What was measured, on disk cell by cell so that a run can be stopped and continued."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """The smallest thing that is measured, and kept: what one method makes of one text.

    Attributes:
        method: the way of attending, or the server, that is asked.
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


class CellFile:
    """The cells that are done, on disk after each.

    Args:
        path: of the JSON file; None keeps nothing.
        fixed: what all cells have in common: the model, settings and the like.
        resume: go on with what the file has.
        run: what is to be known of this run: its command, the machine, versions.

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
