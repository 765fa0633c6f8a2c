"""Figures, a table and a picture of what `benchmarks.accuracy` asked."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.accuracy.ways import FULL
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.common.plots import draw_rates
from vllm_tokenselect.tools.evaluate.rates import rates

Rows = list[dict[str, Any]]


def summarize(cells: Rows) -> Rows:
    """Rates of each way, task and length, and differences from full attention on the same questions."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(_key(cell), {})[cell["number"]] = cell
    rows = []
    for row in rates(cells):
        own = found[_key(row)]
        row["loss"] = fmean(a["loss"] for cell in own.values() for a in cell["answers"])
        full = found.get((FULL, row["task"], row["length"]), {})
        both = [number for number in own if number in full]
        for name in ("right", "loss") if both and row["method"] != FULL else ():
            added = [_mean(own[number], name) - _mean(full[number], name) for number in both]
            row[f"{name}_added"], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(added)
        rows.append(row)
    return rows


def table(summary: Rows) -> Table:
    """One row a way, task and length."""
    found = Table(title="answers, and their differences from full attention's [95 % interval]")
    for name in ("question", "tokens", "way"):
        found.add_column(name)
    for name in ("right", "points", "loss, nats a digit"):
        found.add_column(name, justify="right")
    for row in summary:
        found.add_row(
            row["task"],
            f"{row['length']:,}",
            row["method"],
            f"{row['right']}/{row['questions']}",
            f"{100 * row['rate']:.0f} {_interval(row, 'right', 100, 1)}",
            f"{row['loss']:.3f} {_interval(row, 'loss', 1, 3)}",
        )
    return found


def draw(summary: Rows, folder: Path) -> list[Path]:
    """Rates over length, a picture for each budget: `accuracy-BUDGET.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [row for row in summary if row["task"] == "end"]
    budgets = sorted({int(row["method"].split()[0]) for row in shown if row["method"] != FULL})
    files = []
    for budget in budgets:
        files.append(folder / f"accuracy-{budget}.png")
        own = [row for row in shown if row["method"].split()[0] in (FULL, str(budget))]
        draw_rates(own, f"numbers found, {budget:,} tokens attended", files[-1])
    return files


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["task"], row["length"]


def _mean(cell: dict[str, Any], name: str) -> float:
    return fmean(answer[name] for answer in cell["answers"])


def _interval(row: dict[str, Any], name: str, scale: int, digits: int) -> str:
    if row.get(f"{name}_added") is None:
        return ""
    values = (row[f"{name}_added"], row[f"{name}_low"], row[f"{name}_high"])
    mean, low, high = ("?" if v is None else f"{scale * v:+.{digits}f}" for v in values)
    return f"({mean} [{low}, {high}])"
