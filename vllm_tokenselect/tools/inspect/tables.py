"""The layers, anchors and settings as tables, and the layers and what they share as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.table import Table

from vllm_tokenselect.method.anchors import choose_anchors
from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.common.plots import short_length
from vllm_tokenselect.tools.inspect.candidates import ALL, Candidate, SettingsCost
from vllm_tokenselect.tools.inspect.layers import LayerReport
from vllm_tokenselect.tools.inspect.selections import WAYS
from vllm_tokenselect.tools.inspect.sharing import Float64, kept_by


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


def anchor_table(
    candidates: Sequence[Candidate], layers: Sequence[int], matrices: Mapping[str, Float64]
) -> Table:
    """The anchors to try, and the attention that their selections keep in all layers that select."""
    table = Table(title="anchors, and the share of attention kept; mean over layers")
    table.add_column("dense layers", justify="right")
    table.add_column("anchors")
    for name in matrices:
        table.add_column(name, justify="right")
    table.add_column("layers that select", overflow="fold")
    shown: dict[tuple[int, str], Method] = {}
    for candidate in candidates:
        shown.setdefault((candidate.method.dense_layers, candidate.choice), candidate.method)
    for (dense, choice), method in shown.items():
        first = sum(layer < dense for layer in layers)
        own = list(layers[first:])
        anchors = choose_anchors(method.anchor_layers, own)
        places = [own.index(anchor) for anchor in anchors]
        shares = [f"{kept_by(kept[first:, first:], places):.3f}" for kept in matrices.values()]
        listed = "all" if choice == ALL else " ".join(map(str, anchors))
        table.add_row(str(dense), choice, *shares, listed)
    return table


def cost_table(costs: Sequence[SettingsCost], context: int) -> Table:
    """What the settings read, and what they add to the loss; the cheapest first."""
    table = Table(title="added to the loss, nats a token (95 % interval); lower is better")
    for column in ("dense layers", "top_k"):
        table.add_column(column, justify="right")
    table.add_column("anchors")
    table.add_column(f"read of {short_length(context)}", justify="right")
    kinds = {cost.kind: cost for cost in reversed(costs)}
    for kind, first in reversed(kinds.items()):
        heading = f"{kind} ({first.passages}; full attention {first.loss:.3f})"
        table.add_column(heading, justify="right")
    found: dict[Candidate, dict[str, SettingsCost]] = {}
    for cost in costs:
        found.setdefault(cost.candidate, {})[cost.kind] = cost
    for candidate in sorted(found, key=lambda candidate: candidate.reads):
        table.add_row(
            str(candidate.method.dense_layers),
            f"{candidate.method.top_k:,}",
            candidate.choice,
            f"{100 * candidate.reads / context:.1f} %",
            *(_added(found[candidate][kind]) for kind in reversed(kinds)),
        )
    return table


def draw_matrix(kept: Float64, layers: Sequence[int], path: Path) -> None:
    """Draw how much of each layer's attention the selections below it keep, into an image file."""
    from matplotlib.figure import Figure

    seen = np.where(np.tri(len(kept), k=-1, dtype=bool), np.nan, kept)  # what is nan stays white
    figure = Figure(figsize=(7, 6), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(seen, cmap="viridis", vmax=1.0)
    ticks = range(0, len(layers), max(len(layers) // 15, 1))
    panel.set_xticks(ticks, [str(layers[tick]) for tick in ticks])
    panel.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    panel.set(xlabel="layer that attends", ylabel="layer that selects")
    figure.colorbar(image, ax=panel, label="share of attention kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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


def _added(cost: SettingsCost) -> str:
    interval = "" if cost.low is None else f" ({cost.low:+.4f} to {cost.high:+.4f})"
    return f"{cost.added:+.4f}{interval}"
