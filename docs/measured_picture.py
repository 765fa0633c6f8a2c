"""Draw `docs/measured.png` from the raw files: `.venv/bin/python docs/measured_picture.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
PICTURE = Path(__file__).with_name("measured.png")
SPEED = ("speed.json",)
ACCURACY = "accuracy.json"
# Name in the speed files: label, color.
CONTENDERS = {
    "CPU_ATTN": ("full attention", "#777777"),
    "TOKENSELECT": ("TOKENSELECT", "#0b6e4f"),
    'TOKENSELECT {"profile": "auto"}': ("with five anchor layers", "#4aa3df"),
}
# Name in the accuracy file: label, color.
WAYS = {
    "full": ("full attention", "#777777"),
    "1024 ours": ("TOKENSELECT", "#0b6e4f"),
    "1024 paper": ("the paper's way", "#c97b1a"),
    "1024 sink+local": ("sink + local", "#7d5ba6"),
}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def draw_times(axes: Axes, key: str) -> None:
    """Medians of a time with the range of their samples, by prompt length."""
    rows = [row for name in SPEED for row in read(name)["summary"]]
    for contender, (label, color) in CONTENDERS.items():
        own = sorted(
            (row["prompt_tokens"], row[key])
            for row in rows
            if row["contender"] == contender and row["rate"] is None
        )
        lengths = [length for length, _ in own]
        medians = [time["median"] for _, time in own]
        low = [time["median"] - time["min"] for _, time in own]
        high = [time["max"] - time["median"] for _, time in own]
        axes.errorbar(
            lengths, medians, [low, high], color=color, label=label, marker="o", capsize=3
        )


def draw_answers(axes: Axes) -> None:
    """Right answers with their 95 % interval, by prompt length."""
    rows = read(ACCURACY)["summary"]
    for method, (label, color) in WAYS.items():
        own = sorted(
            (row["length"], 100 * row["rate"], 100 * row["low"], 100 * row["high"])
            for row in rows
            if row["method"] == method and row["task"] == "end"
        )
        lengths, rates, lows, highs = zip(*own, strict=True)
        axes.plot(lengths, rates, color=color, label=label, marker="o")
        axes.fill_between(lengths, lows, highs, color=color, alpha=0.15, linewidth=0)


def label_lengths(axes: Axes, title: str, lengths: list[int]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    figure, (first, later, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    draw_times(first, "ttft_s")
    draw_times(later, "tpot_ms")
    draw_answers(right)
    label_lengths(first, "time to first token, s", [2048, 4096, 8192, 16384])
    label_lengths(later, "time per output token, ms", [2048, 4096, 8192, 16384])
    label_lengths(right, "numbers found, %, 1,024 tokens attended", [1280, 2304, 4352, 7936])
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main()
