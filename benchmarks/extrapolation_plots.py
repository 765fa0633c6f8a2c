"""Plots of a report of `benchmarks.extrapolation`.

python -m benchmarks.extrapolation_plots benchmarks/results/extrapolation-needles.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.extrapolation_losses import BLOCK, TARGET, longest_of_each

_SMOOTHED = 16  # blocks that a point of the loss over position stands for

Rows = list[dict[str, Any]]


def draw(part: str, summary: Rows, cells: Rows, folder: Path) -> list[Path]:
    """Write the pictures of a part, `extrapolation-PART-WHAT.png`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in dict.fromkeys(row["task"] for row in summary if "rate" in row):
        files.append(folder / f"extrapolation-{part}-{task}.png")
        _rates([row for row in summary if row["task"] == task], task, files[-1])
    if passkeys := [cell for cell in cells if cell["depth"] is not None]:
        files.append(folder / f"extrapolation-{part}-depths.png")
        _depths(passkeys, files[-1])
    if losses := longest_of_each(cell for cell in cells if cell["task"] == "text"):
        files.append(folder / f"extrapolation-{part}-losses.png")
        _losses(losses, [row for row in summary if row["kind"] == "paired"], files[-1])
    return files


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def _rates(rows: Rows, task: str, file: Path) -> None:
    """Rate over length, with its interval, one line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        rates = [row["rate"] for row in of_method]
        below = [row["rate"] - row["low"] for row in of_method]
        above = [row["high"] - row["rate"] for row in of_method]
        lengths = [row["length"] for row in of_method]
        panel.errorbar(lengths, rates, [below, above], marker="o", capsize=3, label=method)
    _length_axis(panel, {row["length"] for row in rows})
    panel.set(ylim=(-0.05, 1.05), ylabel="exact answers, 95 % interval", title=task)
    panel.legend()
    figure.savefig(file, dpi=120)


def _length_axis(panel: Any, lengths: set[int]) -> None:
    ticks = sorted(lengths)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [_length(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("tokens")


def _depths(cells: Rows, file: Path) -> None:
    """Rate by length and depth, one panel a method; what was not asked stays white."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    figure = Figure(figsize=(1 + 3 * len(methods), 4), layout="constrained")
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for panel, method in zip(panels, methods, strict=True):
        found = [[_rate_at(cells, method, n, depth) for n in lengths] for depth in depths]
        image = panel.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [_length(n) for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set(title=method, xlabel="tokens")
    panels[0].set_ylabel("depth of the passkey")
    figure.colorbar(image, ax=panels, label="exact answers")
    figure.savefig(file, dpi=120)


def _rate_at(cells: Rows, method: str, length: int, depth: float) -> float:
    right = [
        answer["right"]
        for cell in cells
        if (cell["method"], cell["length"], cell["depth"]) == (method, length, depth)
        for answer in cell["answers"]
    ]
    return sum(right) / len(right) if right else float("nan")


def _losses(cells: Rows, paired: Rows, file: Path) -> None:
    """Loss over position, and what all of the context brings or costs against less of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in dict.fromkeys(cell["method"] for cell in cells):
        texts = [cell["losses"] for cell in cells if cell["method"] == method]
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
    left.set(xlabel="position, K tokens", ylabel="nats per token", title="loss over position")
    left.legend()
    right.axhline(0, color="grey", linewidth=0.8)
    _length_axis(right, {row["end"] for row in paired} or {TARGET})
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
