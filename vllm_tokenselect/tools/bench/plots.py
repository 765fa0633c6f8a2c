"""Rows as plots: times over the prompt's length, throughput over the rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_tokenselect.tools.common.plots import Spread, draw_spreads
from vllm_tokenselect.tools.common.tables import Rows

_TIMES = {"ttft_s": "time to first token, s", "tpot_ms": "time per output token, ms"}
_THROUGHPUT = {
    "requests_per_s": "completed requests/s",
    "output_tokens_per_s": "output tokens/s",
}


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Write `bench-ttft.png`, `bench-tpot.png` and `bench-throughput.png`; none without rows.

    Args:
        rows: of `summarize`.
        folder: made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = [row for row in rows if row["rate"] is None]
    at_rates = [row for row in rows if row["rate"] is not None]
    files = []
    for name, label in _TIMES.items():
        if found := [row for row in alone if row[name] is not None]:
            files.append(folder / f"bench-{name.split('_')[0]}.png")
            _draw_times(found, name, label, files[-1])
    if at_rates:
        files.append(folder / "bench-throughput.png")
        _draw_throughput(at_rates, files[-1])
    return files


def _draw_times(rows: Rows, name: str, label: str, file: Path) -> None:
    """Median over length, from the least to the most, one line for each server."""
    lines = {}
    for contender, of_one in _by_contender(rows):
        times = [(row["prompt_tokens"], row[name]) for row in of_one]
        lines[contender] = [Spread(n, t["min"], t["median"], t["max"]) for n, t in times]
    title = "one request at a time: median, min to max"
    draw_spreads(lines, file, ylim=(0, None), ylabel=label, title=title)


def _draw_throughput(rows: Rows, file: Path) -> None:
    """Completed requests and their tokens over the rate of arrivals, one line for each server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(_THROUGHPUT))
    for panel, (name, label) in zip(panels, _THROUGHPUT.items(), strict=True):
        for contender, of_one in _by_contender(rows):
            rates = [row["rate"] for row in of_one]
            panel.plot(rates, [row[name] for row in of_one], marker="o", label=contender)
        panel.set(xlabel="arriving requests/s", ylabel=label)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    panels[0].axline((0, 0), slope=1, color="0.7", linestyle=":", label="all that arrive")
    panels[0].legend()
    figure.savefig(file, dpi=120)


def _by_contender(rows: Rows) -> Iterator[tuple[str, Rows]]:
    for contender in dict.fromkeys(row["contender"] for row in rows):
        of_one = [row for row in rows if row["contender"] == contender]
        yield contender, sorted(of_one, key=lambda row: (row["rate"] or 0.0, row["prompt_tokens"]))
