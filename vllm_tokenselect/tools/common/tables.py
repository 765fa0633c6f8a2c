"""Rows of results, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

Rows = list[dict[str, Any]]


def grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    """Rows by their values of some names, in the order of the first two values."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return dict(sorted(groups.items(), key=lambda group: group[0][:2]))


def paired(
    cells: Rows, before: str, after: str, value: Callable[[dict[str, Any]], float]
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Values of both methods on the same prompts, by task and length."""
    pairs = {}
    for key, group in grouped(cells, "task", "length").items():
        first, second = (
            {
                (cell["number"], cell.get("depth")): value(cell)
                for cell in group
                if cell["method"] == name
            }
            for name in (before, after)
        )
        if found := [(first[prompt], second[prompt]) for prompt in first if prompt in second]:
            pairs[key] = found
    return pairs


def new_table(title: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table of columns that are aligned left, and columns that are aligned right behind them."""
    table = Table(title=title)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table
