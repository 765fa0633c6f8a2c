"""Does a model that drafts for itself, with few selected tokens, decode faster and lose nothing?

    python -m benchmarks.self_speculation --json benchmarks/results/self-speculation.json

SmolLM2 continues texts (the Python documentation, which comes with Python) by its most likely tokens. In
each round it drafts some tokens, attending to the sink, to what the first draft of the round has selected,
and to the last tokens; then it verifies all of them in one forward pass with full attention. What it says
is what full attention says. For comparison each draft selects anew, or none does (a longer local window).
All ways continue a text in turn, from the same cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.report import SMOLLM2, open_cells
from benchmarks.self_speculation.attention import DraftAttention
from benchmarks.self_speculation.decoding import Decoded, Sequence, decode, speculate
from vllm_tokenselect.tools.common.intervals import mean_interval
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.common.tables import new_table
from vllm_tokenselect.tools.common.text import document
from vllm_tokenselect.tools.evaluate.cells import CannotResume, Cell, CellFile
from vllm_tokenselect.tools.inspect.model import DiagnosedModel

FULL = "full attention"
Way = tuple[str, int, int]  # which drafts select, their budget, and how many there are in a round


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 7936], help="of the texts")
    parser.add_argument("--texts", type=int, default=12, help="texts of each length")
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens of each")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--drafts", type=int, nargs="+", default=[4], help="drafts of a round")
    parser.add_argument(
        "--selects", nargs="+", choices=("first", "each", "none"), default=["first", "each", "none"]
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    parser.add_argument("--resume", action="store_true", help="go on with what the file has")
    return parser.parse_args()


def named(way: Way) -> str:
    selects, budget, drafts = way
    return f"{drafts} drafts, budget {budget:,}, {selects} selects"


def run(
    model: DiagnosedModel, prompt: list[int], ways: list[Way], count: int, first: int
) -> dict[str, Any]:
    """What each way says of a prompt and how long it takes; `first` is the way that begins."""
    sequence = Sequence(model, prompt, len(prompt) + count + max(way[2] for way in ways) + 1)
    begin = len(sequence)
    found: dict[str, Any] = {}
    turns: list[Way | None] = [None, *ways]
    for way in (*turns[first % len(turns) :], *turns[: first % len(turns)]):
        started = time.perf_counter()
        if way is None:
            done: Decoded = decode(sequence, prompt[-1], count)
        else:
            attention = DraftAttention(way[1], way[0])
            done = speculate(sequence, prompt[-1], count, way[2], attention)
        found[named(way) if way else FULL] = done, time.perf_counter() - started
        sequence.take_back(begin)
    return found


def measure(args: argparse.Namespace, cells: CellFile) -> None:
    folder = ensure_smollm2(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DiagnosedModel(str(folder), dtype=args.dtype)
    ways: list[Way] = list(product(args.selects, args.budgets, args.drafts))
    for number, length in product(range(args.texts), args.lengths):
        if Cell(FULL, "text", length, number) in cells:
            continue
        prompt = document(tokenizer, number, length)
        found = run(model, prompt, ways, args.tokens, number)
        full = found[FULL][0].tokens
        for name in (*map(named, ways), FULL):  # the last one tells that a text is done
            done, seconds = found[name]
            result = {"seconds": round(seconds, 4), "same": done.tokens == full}
            if name != FULL:
                result |= {
                    "rounds": done.rounds,
                    "drafted": done.drafted,
                    "accepted": done.accepted,
                }
            cells.add(Cell(name, "text", length, number), result)
        print(f"text {number} of {length:,} tokens", flush=True)


def summarize(cells: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """One row a length and way: means over texts with 95 % intervals, and the median ratio of times."""
    full = {(c["length"], c["number"]): c["seconds"] for c in cells if c["method"] == FULL}
    rows = []
    for length, name in sorted({(c["length"], c["method"]) for c in cells}):
        group = [c for c in cells if (c["length"], c["method"]) == (length, name)]
        ratios = sorted(full[length, c["number"]] / c["seconds"] for c in group)
        row: dict[str, Any] = {"length": length, "method": name, "texts": len(group)}
        row["milliseconds a token"] = 1000 * median(c["seconds"] for c in group) / count
        row["times as fast"] = [median(ratios), ratios[0], ratios[-1]]
        row["same tokens"] = sum(c["same"] for c in group)
        if name != FULL:
            row["accepted"] = fmean(c["accepted"] / c["drafted"] for c in group)
            row["accepted a round"] = mean_interval([c["accepted"] / c["rounds"] for c in group])
        rows.append(row)
    return rows


def show(summary: list[dict[str, Any]]) -> None:
    table = new_table(
        "Decoding with drafts of the model itself [95 % interval] (from the least to the most)",
        ["way"],
        ["length", "ms a token", "times as fast", "accepted a round", "of drafts", "same texts"],
    )
    for row in summary:
        mean, low, high = row.get("accepted a round", (None,) * 3)
        interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
        middle, least, most = row["times as fast"]
        table.add_row(
            row["method"],
            f"{row['length']:,}",
            f"{row['milliseconds a token']:.1f}",
            f"{middle:.2f} ({least:.2f} to {most:.2f})",
            "" if mean is None else f"{mean:.2f}{interval}",
            "" if mean is None else f"{100 * row['accepted']:.0f} %",
            f"{row['same tokens']} of {row['texts']}",
        )
    Console().print(table)


def main() -> int:
    args = arguments()
    fixed = {"model": f"{SMOLLM2}, {args.dtype}", "tokens": args.tokens}
    try:
        cells = open_cells(args.json, fixed, args.resume)
    except CannotResume as problem:
        print(problem, file=sys.stderr)
        return 2
    measure(args, cells)
    summary = summarize(cells.cells, args.tokens)
    cells.write(summary)
    show(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
