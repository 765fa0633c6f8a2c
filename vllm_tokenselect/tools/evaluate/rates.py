"""Rates of right answers, their differences on the same prompts and intervals, as rows and as tables."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.table import Table

from vllm_tokenselect.tools.common.intervals import mean_of_estimates, paired_difference, wilson
from vllm_tokenselect.tools.common.tables import Rows, grouped, new_table, paired


def rates(cells: Rows) -> Rows:
    """Rate of right answers of each method in each task and length, with its interval.

    Args:
        cells: each answer in their `answers` has a score `right`, 0 to 1.
    """
    rows = []
    for (task, length, method), group in grouped(cells, "task", "length", "method").items():
        answers = [answer["right"] for cell in group for answer in cell["answers"]]
        low, high = wilson(sum(answers), len(answers))
        rows.append(
            {
                "task": task,
                "length": length,
                "method": method,
                "right": sum(answers),
                "questions": len(answers),
                "haystacks": len(group),
                "rate": sum(answers) / len(answers),
                "low": low,
                "high": high,
                "seconds": sum(cell["seconds"] for cell in group),
            }
        )
    return rows


def rate_table(rows: Rows) -> Table:
    """Rates with their intervals, one row a task and length, one column a method."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    title = "exact answers: right / asked, rate [95 % interval, Wilson]"
    table = new_table(title, ["task"], ["tokens", *names])
    found = {(row["task"], row["length"], row["method"]): row for row in rows}
    for task, length in sorted({(row["task"], row["length"]) for row in rows}):
        shown = [found.get((task, length, name)) for name in names]
        table.add_row(task, f"{length:,}", *map(_rate, shown))
    return table


def _rate(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['right']:.6g}/{row['questions']}  {row['rate']:.2f} {interval}"


def rate_differences(cells: Rows, before: str, after: str) -> Rows:
    """Differences between the rates of two methods, on the prompts that both were asked.

    Args:
        cells: as for `rates`.
        before: the method that the other is compared with.
        after: the other.
    """
    rows = []
    scores = paired(cells, before, after, _mean_score)
    for (task, length), pairs in scores.items():
        difference, low, high = paired_difference([x for x, _ in pairs], [y for _, y in pairs])
        rows.append(
            {
                "kind": "difference",
                "task": task,
                "length": length,
                "before": before,
                "after": after,
                "difference": difference,
                "low": low,
                "high": high,
                "pairs": len(pairs),
                "better": sum(y > x for x, y in pairs),
                "worse": sum(y < x for x, y in pairs),
            }
        )
    return rows


def _mean_score(cell: dict[str, Any]) -> float:
    return fmean(answer["right"] for answer in cell["answers"])


def difference_table(rows: Rows, before: str, after: str) -> Table:
    """Differences with their intervals, one row a task and length."""
    title = f"{after} minus {before}, the same prompts [95 % interval, Newcombe]"
    headings = ["tokens", "difference", "prompts", f"{after} better", f"{before} better"]
    table = new_table(title, ["task"], headings)
    for row in rows:
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            *(str(row[name]) for name in ("pairs", "better", "worse")),
        )
    return table


def task_means(rows: Rows) -> Rows:
    """Means over the tasks, each counted once, of the rates or differences at a length, with intervals.

    Args:
        rows: of kind "rate" or "difference". Lengths with a single task are left out.
    """
    means: Rows = []
    for (kind, length, method), group in grouped(rows, "kind", "length", "method").items():
        if len(group) < 2:
            continue
        mean, low, high = mean_of_estimates([(row[kind], row["low"], row["high"]) for row in group])
        tasks = sorted(row["task"] for row in group)
        means.append({"kind": f"mean {kind}", "length": length, "tasks": tasks})
        if method is not None:
            means[-1]["method"] = method
        means[-1] |= {kind: mean, "low": low, "high": high}
    return means


def mean_table(rows: Rows) -> Table:
    """Means over the tasks with their intervals, one row a length and method, the difference below."""
    table = new_table("mean of the tasks [95 % interval]", [], ["tokens", "tasks", "", "mean"])
    for row in sorted(rows, key=lambda row: (row["length"], "difference" in row)):
        value = "difference" if "difference" in row else "rate"
        name, sign = (row["method"], "") if value == "rate" else (value, "+")
        shown = (format(row[part], f"{sign}.3f") for part in (value, "low", "high"))
        table.add_row(
            f"{row['length']:,}", str(len(row["tasks"])), name, "{} [{}, {}]".format(*shown)
        )
    return table
