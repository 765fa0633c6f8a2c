"""Plots of a report of `benchmarks.attention`: speed-up over context length, and stage times.

python -m benchmarks.attention.plots benchmarks/results/attention-gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("score", "vote", "select", "attend")

Rows = list[dict[str, Any]]


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Two files a shape: `attention-speedup-SHAPE.png` and `attention-stages-SHAPE.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for shape in dict.fromkeys(result["shape"] for result in report["results"]):
        results = [result for result in report["results"] if result["shape"] == shape]
        title = f"{shape}, {report['environment']['gpu']}"
        for kind, plot in (("speedup", _speedup), ("stages", _stages)):
            files.append(folder / f"attention-{kind}-{shape.lower()}.png")
            _panels(results, title, plot, files[-1])
    return files


def _panels(results: Rows, title: str, plot: Callable[[Any, Rows], str], file: Path) -> None:
    """One panel for each kind of step, by a function that returns the vertical axis' label."""
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(result["step"] for result in results))
    figure = Figure(figsize=(4 * len(steps), 4), layout="constrained")
    panels = figure.subplots(1, len(steps), squeeze=False)[0]
    for panel, step in zip(panels, steps, strict=True):
        label = plot(panel, [result for result in results if result["step"] == step])
        panel.set_title(step)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    panels[0].set_ylabel(label)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _speedup(panel: Any, results: Rows) -> str:
    for baseline in dict.fromkeys(name for result in results for name in result["ratio_to"]):
        points = [
            (result["context"] / 1024, result["ratio_to"][baseline]["reselect"])
            for result in results
            if baseline in result["ratio_to"]
        ]
        panel.plot(*zip(*points, strict=True), marker="o", label=f"against {baseline}")
    panel.axhline(1, color="grey", linewidth=0.8)
    panel.set(xscale="log", yscale="log", xlabel="context, K tokens")
    return "times faster, every row selecting"


def _stages(panel: Any, results: Rows) -> str:
    labels = [f"{result['context'] // 1024}K" for result in results]
    below = [0.0] * len(results)
    for stage in STAGES:
        heights = [result["us"][stage]["median_us"] for result in results]
        panel.bar(labels, heights, bottom=below, label=stage)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    panel.set_xlabel("context")
    return "microseconds a layer"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for written in draw(json.loads(source.read_text()), source.parent):
        print(written)
