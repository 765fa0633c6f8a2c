"""Rows as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vllm_tokenselect.tools.common.tables import Rows


def alone_table(rows: Rows) -> Table:
    """One request at a time: a row for each length and server.

    Args:
        rows: of `summarize`, those without a rate.
    """
    table = Table(
        title="One request at a time: median (min to max); faster: mean of the ratios to the first server "
        "[95 % interval], above 1 is faster"
    )
    columns = ["TTFT s", "faster", "TPOT ms", "faster", *_kept(rows)]
    _head(table, "prompt tokens", columns)
    for row in rows:
        times = []
        for name in ("ttft_s", "tpot_ms"):
            times += [_range(row[name]), _ratio(row.get("faster", {}).get(name))]
        table.add_row(f"{row['prompt_tokens']:,}", row["contender"], *times, *_rest(row, rows))
    return table


def rate_table(rows: Rows) -> Table:
    """Requests as they arrive: a row for each rate and server.

    Args:
        rows: of `summarize`, those with a rate.
    """
    lengths = ", ".join(sorted({f"{row['prompt_tokens']:,}" for row in rows}))
    table = Table(
        title=f"At rates, prompts of {lengths} tokens: median / 95th percentile, from a request's arrival"
    )
    columns = ["done/s", "output tokens/s", "TTFT s", "TPOT ms", "waited", *_kept(rows)]
    _head(table, "requests/s", columns)
    for row in rows:
        table.add_row(
            f"{row['rate']:g}",
            row["contender"],
            f"{row['requests_per_s']:.3g}",
            f"{row['output_tokens_per_s']:.1f}",
            _tail(row["ttft_s"]),
            _tail(row["tpot_ms"]),
            f"{row['waited']} of {row['requests']}",
            *_rest(row, rows),
        )
    return table


# Columns on the right of both tables; one that has no value in any row is left out.
_REST = {
    "worker MiB": "worker_rss_mib",
    "GPU MiB": "device_mib",
    "attended": "attended",
    "reused": "reused",
}


def _head(table: Table, first: str, columns: list[str]) -> None:
    table.add_column(first, justify="right")
    table.add_column("server")
    for column in columns:
        table.add_column(column, justify="right")


def _kept(rows: Rows) -> list[str]:
    known = [title for title, key in _REST.items() if any(row[key] is not None for row in rows)]
    return [*known, "failed"]


def _rest(row: dict[str, Any], rows: Rows) -> list[str]:
    cells = []
    for title in _kept(rows)[:-1]:
        value = row[_REST[title]]
        words = "{:.0f}" if title.endswith("MiB") else "{:.0%}"
        cells.append("" if value is None else words.format(value))
    return [*cells, f"{row['failed']} of {row['requests']}"]


def _range(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    low, middle, high = (_short(spread[key]) for key in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def _tail(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{_short(spread['median'])} / {_short(spread['p95'])}"


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    words = f"{ratio['ratio']:.2f}x"
    return words if ratio["low"] is None else f"{words} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
