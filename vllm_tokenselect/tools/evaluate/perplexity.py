"""Losses on real text and their differences, as rows and as a table."""

from __future__ import annotations

from math import exp
from statistics import fmean
from typing import Any

from rich.table import Table

from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.common.tables import Rows, grouped, new_table, paired


def loss_rows(cells: Rows) -> Rows:
    """Mean loss of each method at each length, its interval over texts.

    The tokens of one text depend on each other, so the interval counts texts.

    Args:
        cells: one a text, with the `losses` of its tokens, nats.
    """
    rows = []
    for (task, length, method), group in grouped(cells, "task", "length", "method").items():
        loss, low, high = mean_interval([*map(_mean_loss, group)])
        row = {"kind": "loss", "task": task, "length": length, "method": method}
        tokens = sum(len(cell["losses"]) for cell in group)
        rows.append(row | _figures(loss, low, high) | {"texts": len(group), "tokens": tokens})
    return rows


def loss_differences(cells: Rows, before: str, after: str) -> Rows:
    """Loss that one method adds to another's on the same tokens, nats a token; interval over texts."""
    rows = []
    for (task, length), pairs in paired(cells, before, after, _mean_loss).items():
        row = {"kind": "loss difference", "task": task, "length": length}
        figures = _figures(*mean_interval([second - first for first, second in pairs]))
        rows.append(row | {"method": f"{after} - {before}"} | figures | {"texts": len(pairs)})
    return rows


def _mean_loss(cell: dict[str, Any]) -> float:
    return fmean(cell["losses"])


def _figures(loss: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"loss": loss, "low": low, "high": high}


def loss_table(rows: Rows) -> Table:
    """Losses and their differences, with perplexities."""
    title = "real text: nats per token [95 % interval over texts, Student's t]"
    table = new_table(title, ["task"], ["tokens"])
    table.add_column("server")
    for heading in ("nats per token", "perplexity", "texts"):
        table.add_column(heading, justify="right")
    for row in rows:
        compared = row["kind"] == "loss difference"
        interval = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            row["method"],
            f"{row['loss']:+.4f}{interval}",
            f"x {exp(row['loss']):.4f}" if compared else f"{exp(row['loss']):.3f}",
            str(row["texts"]),
        )
    return table
