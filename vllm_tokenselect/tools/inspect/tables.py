"""The layers and the budgets as tables, and the layers as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.table import Table

from vllm_tokenselect.tools.inspect.budgets import BudgetCost
from vllm_tokenselect.tools.inspect.layers import LayerReport
from vllm_tokenselect.tools.inspect.selections import WAYS


def layer_table(layers: Sequence[LayerReport], kind: str) -> Table:
    """Attention kept and relative error of the output, by layer and way to select."""
    table = Table(title=f"{kind}: attention kept / relative error of the output")
    table.add_column("layer", justify="right")
    for way in WAYS:
        table.add_column(way, justify="right", no_wrap=True)
    table.add_column("reuses", justify="right")
    for report in layers:
        cells = [f"{report.mass[kind][w]:.3f} / {report.error[kind][w]:.3f}" for w in WAYS]
        table.add_row(str(report.layer), *cells, _share(report.reuse))
    table.add_section()
    means = [
        f"{fmean(r.mass[kind][w] for r in layers):.3f} / {fmean(r.error[kind][w] for r in layers):.3f}"
        for w in WAYS
    ]
    reuse = [r.reuse for r in layers if r.reuse is not None]
    table.add_row("mean", *means, _share(fmean(reuse) if reuse else None))
    return table


def budget_table(costs: Sequence[BudgetCost]) -> Table:
    """What each budget adds to the loss."""
    table = Table(title="added to the loss, nats a token (95 % interval); lower is better")
    table.add_column("top_k", justify="right")
    kinds = list(dict.fromkeys(cost.kind for cost in costs))
    for kind in kinds:
        first = next(cost for cost in costs if cost.kind == kind)
        table.add_column(
            f"{kind} ({first.passages}; full attention {first.loss:.3f})", justify="right"
        )
    for top_k in sorted({cost.top_k for cost in costs}):
        row = {cost.kind: cost for cost in costs if cost.top_k == top_k}
        table.add_row(f"{top_k:,}", *(_added(row[kind]) if kind in row else "" for kind in kinds))
    return table


def draw_layers(layers: Sequence[LayerReport], path: Path) -> None:
    """Draw both measures over the layers, a line for each way to select, into an image file."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in layers[0].mass if layers[0].mass[kind]]
    figure = Figure(figsize=(5.5 * len(kinds), 7), layout="constrained")
    grid = figure.subplots(2, len(kinds), sharex=True, squeeze=False)
    numbers = [report.layer for report in layers]
    for column, kind in enumerate(kinds):
        for way in WAYS:
            grid[0][column].plot(numbers, [r.mass[kind][way] for r in layers], label=way)
            grid[1][column].plot(numbers, [r.error[kind][way] for r in layers], label=way)
        grid[0][column].set(title=kind, ylabel="share of attention kept", ylim=(None, 1.0))
        grid[1][column].set(xlabel="layer", ylabel="relative error of the output", ylim=(0.0, None))
    grid[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _added(cost: BudgetCost) -> str:
    interval = "" if cost.low is None else f" ({cost.low:+.4f} to {cost.high:+.4f})"
    return f"{cost.added:+.4f}{interval}"
