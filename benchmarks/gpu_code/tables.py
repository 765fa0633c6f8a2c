"""Tables of counts; before and after beside each other where there are two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from vllm_tokenselect.tools.common.tables import Rows, new_table

Row = dict[str, Any]
LAYER = ("shape", "context", "batch", "layer")
KERNEL = ("kernel", "variant")


def paired(before: Rows, after: Rows, names: tuple[str, ...]) -> list[tuple[Row, Row]]:
    """Rows of the same names; an empty one stands for what is missing."""
    old, new = (
        {tuple(row[name] for name in names): row for row in rows} for rows in (before, after)
    )
    return [(old.get(key, {}), new.get(key, {})) for key in {**new, **old}]


def layer_table(report: Row, earlier: Row | None) -> Table:
    title = "Launches of a layer in a captured decoding step"
    columns = {name: counter(name) for name in ("launches", "groups")}
    return _table(title, LAYER, columns, earlier and earlier["layers"], report["layers"])


def kernel_table(report: Row, earlier: Row | None) -> Table:
    columns = {
        "registers": counter("registers"),
        "stack B": counter("stack_bytes"),
        "shared B": counter("shared_bytes"),
    }
    kinds = (report["kernels"] or [{"instructions": {}}])[0]["instructions"]
    columns |= {kind: counter("instructions", kind) for kind in kinds}
    title = f"Kernels of sm_{report['architecture']}, and their instructions as they stand"
    return _table(title, KERNEL, columns, earlier and earlier["kernels"], report["kernels"])


def counter(*path: str) -> Callable[[Row], Any]:
    """What stands in a row under these names."""

    def count(row: Row) -> Any:
        for name in path:
            row = row[name]
        return row

    return count


def _table(
    title: str,
    names: tuple[str, ...],
    columns: dict[str, Callable[[Row], Any]],
    earlier: Rows | None,
    later: Rows,
) -> Table:
    compares = earlier is not None
    table = new_table(title + (", before -> after" if compares else ""), names, list(columns))
    for before, after in paired(earlier or [], later, names):
        cells = [str((after or before)[name]) for name in names]
        for count in columns.values():
            told = [str(count(row)) if row else "-" for row in (before, after)]
            cells.append(" -> ".join(told) if compares else told[1])
        table.add_row(*cells)
    return table
