"""Plots of a report of `benchmarks.attention`: speed-up over context length, and stage times.

python -m benchmarks.attention.plots benchmarks/results/attention-gpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STAGES = ("score", "vote", "select", "attend")


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Two files a shape: `attention-speedup-SHAPE.png` and `attention-stages-SHAPE.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for shape in dict.fromkeys(result["shape"] for result in report["results"]):
        results = [result for result in report["results"] if result["shape"] == shape]
        title = f"{shape}, {report['environment']['gpu']}"
        for kind, plot in (("speedup", _speedup), ("stages", _stages)):
            files.append(folder / f"attention-{kind}-{shape.lower()}.png")
            plot(results, title, files[-1])
    return files


def _steps(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(result["step"] for result in results))


def _speedup(results: list[dict[str, Any]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    steps = _steps(results)
    figure = Figure(figsize=(4 * len(steps), 4), layout="constrained")
    panels = figure.subplots(1, len(steps), squeeze=False)[0]
    for panel, step in zip(panels, steps, strict=True):
        of_step = [result for result in results if result["step"] == step]
        for baseline in dict.fromkeys(name for r in of_step for name in r["ratio_to"]):
            points = [
                (r["context"] / 1024, r["ratio_to"][baseline]["reselect"])
                for r in of_step
                if baseline in r["ratio_to"]
            ]
            panel.plot(*zip(*points, strict=True), marker="o", label=f"against {baseline}")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=step, xlabel="context, K tokens")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    panels[0].set_ylabel("times faster, every row selecting")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _stages(results: list[dict[str, Any]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    steps = _steps(results)
    figure = Figure(figsize=(4 * len(steps), 4), layout="constrained")
    panels = figure.subplots(1, len(steps), squeeze=False)[0]
    for panel, step in zip(panels, steps, strict=True):
        of_step = [result for result in results if result["step"] == step]
        labels = [f"{result['context'] // 1024}K" for result in of_step]
        below = [0.0] * len(of_step)
        for stage in STAGES:
            heights = [result["us"][stage]["median_us"] for result in of_step]
            panel.bar(labels, heights, bottom=below, label=stage)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        panel.set(title=step, xlabel="context")
    panels[0].set_ylabel("microseconds a layer")
    panels[-1].legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for written in draw(json.loads(source.read_text()), source.parent):
        print(written)
