"""Plots of rates: over the length, and over length and depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_tokenselect.tools.common.tables import Rows


@dataclass(frozen=True)
class DepthPoint:
    """A score, 0 to 1, of what one method found at a depth, 0 to 1, of a prompt of `length` tokens."""

    method: str
    length: int
    depth: float
    right: float


def draw_rates(rows: Rows, task: str, file: Path) -> None:
    """Rate over length, with its interval, one line for each method."""
    lines: dict[str, list[Spread]] = {}
    for row in rows:
        spread = Spread(row["length"], row["low"], row["rate"], row["high"])
        lines.setdefault(row["method"], []).append(spread)
    draw_spreads(lines, file, ylim=(-0.05, 1.05), ylabel="exact answers, 95 % interval", title=task)


class Spread(NamedTuple):
    """A value at a length in tokens, and the ends of its range."""

    length: int
    low: float
    value: float
    high: float


def draw_spreads(lines: Mapping[str, Sequence[Spread]], file: Path, **axes: Any) -> None:
    """Values with their ranges over the length, one line for each name; `axes` are matplotlib's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for name, spreads in lines.items():
        below = [spread.value - spread.low for spread in spreads]
        above = [spread.high - spread.value for spread in spreads]
        lengths, values = [s.length for s in spreads], [s.value for s in spreads]
        panel.errorbar(lengths, values, [below, above], marker="o", capsize=3, label=name)
    length_axis(panel, {spread.length for spreads in lines.values() for spread in spreads})
    panel.set(**axes)
    panel.legend()
    figure.savefig(file, dpi=120)


def length_axis(panel: Any, lengths: Iterable[int]) -> None:
    """A logarithmic axis of tokens, with a tick for each length."""
    ticks = sorted(lengths)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [short_length(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("tokens")


def short_length(tokens: int) -> str:
    """`4K` for 4,096 tokens, `1.25K` for 1,280."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else str(tokens)


def draw_depths(points: Sequence[DepthPoint], file: Path, hidden: str) -> None:
    """Rate by length and depth, one panel for each method; what was not asked stays white.

    Args:
        hidden: the name of what stands at a depth.
    """
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(point.method for point in points))
    lengths = sorted({point.length for point in points})
    depths = sorted({point.depth for point in points})
    figure = Figure(figsize=(1 + 3 * len(methods), 4), layout="constrained")
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for panel, method in zip(panels, methods, strict=True):
        found = [[_rate_at(points, method, n, depth) for n in lengths] for depth in depths]
        image = panel.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [short_length(n) for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set(title=method, xlabel="tokens")
    panels[0].set_ylabel(f"depth of the {hidden}")
    figure.colorbar(image, ax=panels, label="exact answers")
    figure.savefig(file, dpi=120)


def _rate_at(points: Sequence[DepthPoint], method: str, length: int, depth: float) -> float:
    right = [
        point.right
        for point in points
        if (point.method, point.length, point.depth) == (method, length, depth)
    ]
    return sum(right) / len(right) if right else float("nan")
