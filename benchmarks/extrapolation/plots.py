"""Plots of a report of `benchmarks.extrapolation`.

python -m benchmarks.extrapolation.plots benchmarks/results/extrapolation-needles.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.extrapolation.long_text import BLOCK, TARGET, longest_of_each
from vllm_tokenselect.tools.common.plots import DepthPoint, draw_depths, draw_rates, length_axis

_SMOOTHED = 16  # blocks that a point of the loss over position stands for

Rows = list[dict[str, Any]]


def draw(part: str, summary: Rows, cells: Rows, folder: Path) -> list[Path]:
    """Write the pictures of a part, `extrapolation-PART-WHAT.png`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in dict.fromkeys(row["task"] for row in summary if "rate" in row):
        files.append(folder / f"extrapolation-{part}-{task}.png")
        draw_rates([row for row in summary if row["task"] == task], task, files[-1])
    if passkeys := [cell for cell in cells if cell["depth"] is not None]:
        files.append(folder / f"extrapolation-{part}-depths.png")
        draw_depths(_depths(passkeys), files[-1], "passkey")
    if losses := longest_of_each(cell for cell in cells if cell["task"] == "text"):
        files.append(folder / f"extrapolation-{part}-losses.png")
        _losses(losses, [row for row in summary if row["kind"] == "paired"], files[-1])
    return files


def _depths(cells: Rows) -> list[DepthPoint]:
    return [
        DepthPoint(cell["method"], cell["length"], cell["depth"], answer["right"])
        for cell in cells
        for answer in cell["answers"]
    ]


def _losses(cells: Rows, paired: Rows, file: Path) -> None:
    """Loss over position, and what all of the context brings or costs against less of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    read: dict[str, dict[int, list[float]]] = {}  # losses by method and text
    for cell in cells:
        read.setdefault(cell["method"], {})[cell["number"]] = cell["losses"]
    # Texts differ in difficulty: a curve shows those that every method has read.
    shown = set.intersection(*map(set, read.values()))
    for method, losses_of in read.items():
        texts = [losses_of[number] for number in shown]
        reached = range(max(map(len, texts)))
        means = [fmean(losses[i] for losses in texts if i < len(losses)) for i in reached]
        starts = range(0, len(means), _SMOOTHED)
        points = [means[start : start + _SMOOTHED] for start in starts]
        left.plot(
            [
                BLOCK * (start + len(point) / 2) / 1024
                for start, point in zip(starts, points, strict=True)
            ],
            [fmean(point) for point in points],
            label=method,
        )
        rows = [row for row in paired if row["method"] == method]
        right.errorbar(
            [row["end"] for row in rows],
            [row["difference"] for row in rows],
            [2 * (row["se"] or 0) for row in rows],
            marker="o",
            capsize=3,
            label=method,
        )
    left.set(
        xlabel="position, K tokens",
        ylabel="nats per token",
        title="loss over position, on the same texts",
    )
    left.legend()
    right.axhline(0, color="grey", linewidth=0.8)
    length_axis(right, {row["end"] for row in paired} or {TARGET})
    right.set(
        ylabel="nats per token, 2 standard errors",
        title="the same tokens, all before them read,\nagainst full attention to the last 8K",
    )
    right.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    report = json.loads(source.read_text())
    part = report["fixed"]["part"]
    for written in draw(part, report["summary"], report["cells"], source.parent):
        print(written)
