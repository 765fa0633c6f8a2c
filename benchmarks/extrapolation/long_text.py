"""What SmolLM2 loses on long text: losses by position, and against the same tokens with less context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp, sqrt
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from benchmarks.extrapolation.parts import SmolLM2, lengths_of
from benchmarks.extrapolation.served import FULL, Asker, trained_length
from vllm_tokenselect.tools.common.text import document
from vllm_tokenselect.tools.evaluate.cells import Cell

TEXT = "text"  # the task of the cells that read a text from its start
SHORTENED = "shortened text"  # of those that read its last tokens with full attention
BLOCK = 128  # tokens; blocks are what standard errors are over
TARGET = 1024  # tokens before an end that are compared
_FIRST_EDGE = 1024


class Perplexity(SmolLM2):
    """What SmolLM2 loses on long real text, by position, and with less context on the same tokens."""

    def cells(self, method: str) -> Iterator[Cell]:
        args = self._args
        trained = trained_length(self.model)
        lengths = lengths_of(method, args, trained)
        for number in range(args.samples):
            if lengths:
                yield Cell(method, TEXT, max(lengths), number)
            if method == FULL:
                for length in sorted(args.lengths):
                    if length >= trained:
                        yield Cell(method, SHORTENED, length, number)

    def ask(self, asker: Asker, cell: Cell) -> dict[str, Any]:
        if cell.task == TEXT:
            # A block is read on, so that no token that counts is in the prompt's tail, where each token
            # selects for itself.
            read = document(self._tokenizer, cell.number, cell.length + BLOCK)
            return {"losses": block_means(asker.losses(read))[: cell.length // BLOCK]}
        read = document(self._tokenizer, cell.number, cell.length)[-trained_length(self.model) :]
        return {"losses": block_means(asker.losses(read))[-(TARGET // BLOCK) :]}

    def summarize(self, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return summarize(cells)

    def tables(self, summary: list[dict[str, Any]]) -> list[Table]:
        return loss_tables(summary)


def block_means(losses: list[float]) -> list[float]:
    """Means over blocks of a text's tokens, of losses that start with that of the second token."""
    starts = [0, *range(BLOCK - 1, len(losses), BLOCK)]
    return [
        round(fmean(losses[start:end]), 5)
        for start, end in zip(starts, [*starts[1:], len(losses)], strict=True)
        if end > start
    ]


def summarize(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean losses of each way between positions, and its differences from less context.

    Args:
        cells: with the block means of their `losses`.
    """
    rows = []
    read = longest_of_each(cell for cell in cells if cell["task"] == TEXT)
    less = {(c["number"], c["length"]): c["losses"] for c in cells if c["task"] == SHORTENED}
    for method in dict.fromkeys(cell["method"] for cell in read):
        of_method = [cell for cell in read if cell["method"] == method]
        rows += _by_position(method, of_method)
        rows += _differences(method, of_method, less)
    return rows


def longest_of_each(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each text the cell of a method that read the most of it."""
    found = {(c["method"], c["number"]): c for c in sorted(cells, key=lambda c: int(c["length"]))}
    return list(found.values())


def _by_position(method: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    start, end = 0, _FIRST_EDGE
    longest = max(cell["length"] for cell in cells)
    while start < longest:
        blocks = [x for cell in cells for x in cell["losses"][start // BLOCK : end // BLOCK]]
        if blocks:
            row = {"kind": "position", "method": method, "start": start, "end": end}
            rows.append(row | _mean(blocks) | {"texts": len(cells)})
        start, end = end, 2 * end
    return rows


def _differences(
    method: str, cells: list[dict[str, Any]], less: dict[tuple[int, int], list[float]]
) -> list[dict[str, Any]]:
    rows = []
    for end in sorted({length for _, length in less}):
        pairs = [
            (with_all, with_less)
            for cell in cells
            if cell["length"] >= end and (cell["number"], end) in less
            for with_all, with_less in zip(
                cell["losses"][(end - TARGET) // BLOCK : end // BLOCK],
                less[cell["number"], end],
                strict=True,
            )
        ]
        if not pairs:
            continue
        differences = _mean([with_all - with_less for with_all, with_less in pairs])
        rows.append(
            {
                "kind": "paired",
                "method": method,
                "end": end,
                "loss": fmean(with_all for with_all, _ in pairs),
                "loss_with_less": fmean(with_less for _, with_less in pairs),
                "difference": differences["loss"],
                "se": differences["se"],
                "blocks": len(pairs),
            }
        )
    return rows


def _mean(blocks: list[float]) -> dict[str, Any]:
    error = stdev(blocks) / sqrt(len(blocks)) if len(blocks) > 1 else None
    return {"loss": fmean(blocks), "se": error, "blocks": len(blocks)}


def loss_tables(summary: list[dict[str, Any]]) -> list[Table]:
    """Losses by position, and perplexities of the same tokens with more and with less context."""
    by_position = Table(title="nats per token by position (standard error over blocks)")
    by_position.add_column("positions", justify="right")
    rows = [row for row in summary if row["kind"] == "position"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    for name in names:
        by_position.add_column(name, justify="right")
    found = {(row["method"], row["start"]): row for row in rows}
    for start, end in sorted({(row["start"], row["end"]) for row in rows}):
        shown = [found.get((name, start)) for name in names]
        cells = ["-" if r is None else f"{r['loss']:.3f} ({_error(r)})" for r in shown]
        by_position.add_row(f"{start:,} to {end:,}", *cells)
    return [by_position, _paired_table(summary)]


def _paired_table(summary: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"the {TARGET:,} tokens before an end: all that stands before them, against full attention "
        "to no more than the trained length"
    )
    table.add_column("method")
    for heading in ("end", "perplexity", "with less context", "nats per token more", "blocks"):
        table.add_column(heading, justify="right")
    for row in summary:
        if row["kind"] == "paired":
            table.add_row(
                row["method"],
                f"{row['end']:,}",
                f"{exp(row['loss']):.2f}",
                f"{exp(row['loss_with_less']):.2f}",
                f"{row['difference']:+.4f} ({_error(row)})",
                str(row["blocks"]),
            )
    return table


def _error(row: dict[str, Any]) -> str:
    return "-" if row["se"] is None else f"{row['se']:.4f}"
