"""How far a way's predictions are from full attention's, token by token, and over all texts."""

from __future__ import annotations

from math import exp, log
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.continuation.served import Continuation
from benchmarks.continuation.ways import FULL
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.common.tables import Rows, grouped, new_table

BLOCK = 50  # tokens, of which means are kept
_LEAST = 1e-9  # a probability that is as good as none


def compare(full: Continuation, other: Continuation) -> dict[str, Any]:
    """What a way makes of the tokens that full attention generated.

    Returns:
        `kl`, means over blocks of tokens, nats; `loss`, by how much less likely full attention's own tokens
        are, means over the same blocks, nats; `leaves`, the tokens at which another one is more likely.
    """
    kl, loss, leaves = [], [], []
    for index, token in enumerate(full.tokens):
        likely, others = full.likely[index], other.likely[index]
        kl.append(divergence(likely, others))
        loss.append(likely[token] - others[token])
        if max(others, key=lambda t: others[t]) != token and max(others.values()) > others[token]:
            leaves.append(index)
    return {"kl": block_means(kl), "loss": block_means(loss), "leaves": leaves}


def divergence(full: dict[int, float], other: dict[int, float]) -> float:
    """KL(full || other), nats, of the tokens that both list, all others counted as one.

    Both list their most likely tokens. What is not told apart cannot diverge, so this is never more than
    the divergence over the whole vocabulary.

    Args:
        full: log-probabilities by token.
        other: the same.
    """
    shared = full.keys() & other.keys()
    rest, others = (
        max(1.0 - sum(exp(way[token]) for token in shared), _LEAST) for way in (full, other)
    )
    told = sum(exp(full[token]) * (full[token] - other[token]) for token in shared)
    return max(told + rest * (log(rest) - log(others)), 0.0)


def block_means(values: list[float]) -> list[float]:
    """Means over blocks of tokens."""
    return [round(fmean(values[i : i + BLOCK]), 5) for i in range(0, len(values), BLOCK)]


def summarize(cells: Rows, count: int) -> Rows:
    """One row a way: means over texts, with 95 % intervals (Student's t)."""
    rows = []
    for (way,), group in grouped(cells, "method").items():
        if way == FULL:
            continue
        row = {"method": way, "texts": len(group)}
        row["same"] = sum(not cell["leaves"] for cell in group)
        values = {
            "kl": [fmean(cell["kl"]) for cell in group],
            "loss": [fmean(cell["loss"]) for cell in group],
            "others": [len(cell["leaves"]) / count for cell in group],
            "first": [float(cell["leaves"][0] if cell["leaves"] else count) for cell in group],
        }
        for name, each in values.items():
            row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(each)
        rows.append(row)
    return rows


def table(summary: Rows, count: int) -> Table:
    """One row a way."""
    found = new_table(
        f"{count} tokens that full attention generated, as each way predicts them [95 % interval]",
        ["way"],
        [
            "texts",
            "KL, nats a token",
            "loss, nats a token",
            "other tokens, %",
            "first",
            "left none",
        ],
    )
    for row in summary:
        found.add_row(
            row["method"],
            str(row["texts"]),
            _interval(row, "kl", 1, 4),
            _interval(row, "loss", 1, 4),
            _interval(row, "others", 100, 1),
            _interval(row, "first", 1, 0),
            str(row["same"]),
        )
    return found


def _interval(row: dict[str, Any], name: str, scale: int, digits: int) -> str:
    mean, low, high = (
        "?" if v is None else f"{scale * v:.{digits}f}"
        for v in (row[name], row[f"{name}_low"], row[f"{name}_high"])
    )
    return f"{mean} [{low}, {high}]"
