"""The plots of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_tokenselect.tools.common.plots import DepthPoint, draw_depths, draw_rates
from vllm_tokenselect.tools.common.tables import Rows

_DEPTH_BINS = 10


def draw(summary: Rows, done: Rows, folder: Path) -> list[Path]:
    """Write `eval-TASK.png`, accuracy over length, and `eval-TASK-depths.png`, over length and depth.

    Depths that a task does not choose are grouped into tenths.

    Args:
        summary: rows of the report.
        done: its cells.
        folder: made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    rates = [row for row in summary if row["kind"] == "rate"]
    for task in dict.fromkeys(row["task"] for row in rates):
        files.append(folder / f"eval-{task}.png")
        draw_rates([row for row in rates if row["task"] == task], task, files[-1])
        points = [
            DepthPoint(cell["method"], cell["length"], _depth(cell, answer), answer["right"])
            for cell in done
            if cell["task"] == task
            for answer in cell["answers"]
        ]
        if len({point.depth for point in points}) > 1:
            files.append(folder / f"eval-{task}-depths.png")
            draw_depths(points, files[-1], f"first answer: {task}")
    return files


def _depth(cell: dict[str, Any], answer: dict[str, Any]) -> float:
    if cell["depth"] is not None:
        return float(cell["depth"])
    tenth = min(int(answer["depth"] * _DEPTH_BINS), _DEPTH_BINS - 1)
    return (tenth + 0.5) / _DEPTH_BINS
