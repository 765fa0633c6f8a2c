"""Accuracy past the trained length, of reassigned positions against what else there is.

    python -m benchmarks.extrapolation constructed --json benchmarks/results/extrapolation-constructed.json
    python -m benchmarks.extrapolation needles     --json benchmarks/results/extrapolation-needles.json
    python -m benchmarks.extrapolation perplexity  --json benchmarks/results/extrapolation-perplexity.json

constructed: a model whose weights are constructed to recall exactly (`constructed_model`), for 2,048
tokens at most. It shows the mechanism, without language.

needles: SmolLM2-135M-Instruct, trained for 8,192 tokens, is asked for a passkey in noise, at depths from
the start to the end, and for eight numbers that stand in one long text.

perplexity: SmolLM2 reads long text. Text differs in difficulty from place to place. So the last 1,024
tokens before each end are also read with full attention to only the 8,192 tokens up to there. What more
context brings or costs is a difference on the same tokens. The texts are the same chapters in other
orders, so the standard errors are a little small.

Methods: "full" is vLLM's own CPU attention, past the trained length too. "reassigned" and "native" are
TokenSelect with and without reassigned positions. "sink+local" attends to as many tokens at reassigned
positions and selects one of them. "window" is a plain sliding window of as many.

The text is the Python documentation, which comes with Python. One server runs at a time. Every result is
in the JSON file at once. With --resume a run goes on where it was stopped, also with more lengths,
methods or samples than before.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.extrapolation.long_text import Perplexity
from benchmarks.extrapolation.parts import Constructed, Needles, Part
from benchmarks.extrapolation.plots import draw
from benchmarks.extrapolation.served import (
    FULL,
    NATIVE,
    REASSIGNED,
    SINK_LOCAL,
    WINDOW,
    Asker,
    Deadline,
    OutOfTime,
    ServedWay,
    served_ways,
    server,
)
from benchmarks.report import open_cells
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.tools.common.progress import counting_bar
from vllm_tokenselect.tools.evaluate.cells import CannotResume, Cell, CellFile

K = 1024
# At most 912 tokens are attended to, of the 2,048 that the constructed model is exact for.
CONSTRUCTED_SETTINGS = {"n_init": 16, "n_local": 128, "top_k": 512, "query_chunk": 256}
PARTS: dict[str, type[Constructed] | type[Needles] | type[Perplexity]] = {
    "constructed": Constructed,
    "needles": Needles,
    "perplexity": Perplexity,
}


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    constructed, needles, perplexity = (parts.add_parser(name) for name in PARTS)
    _common(constructed, [512 << i for i in range(8)], [REASSIGNED, WINDOW, FULL])
    lengths = [n * K for n in (4, 8, 12, 16, 32, 64)]
    _common(needles, lengths, [REASSIGNED, SINK_LOCAL, NATIVE, FULL])
    _common(perplexity, [n * K for n in (8, 16, 32, 64)], [REASSIGNED, SINK_LOCAL, FULL])
    constructed.set_defaults(base_settings=CONSTRUCTED_SETTINGS, full_up_to=64 * K)
    for part in (constructed, needles):
        part.add_argument(
            "--samples", type=int, default=100, help="questions for each length, at least"
        )
        part.add_argument("--questions", type=int, default=8, help="questions about one text")
    needles.add_argument("--tasks", nargs="+", default=["facts", "passkey"], metavar="TASK")
    needles.add_argument(
        "--passkeys", type=int, default=100, help="passkeys for each length, at least"
    )
    needles.add_argument("--depths", type=int, default=10, help="depths at which passkeys stand")
    perplexity.add_argument("--samples", type=int, default=4, help="texts to read")
    return parser.parse_args(command)


def _common(parser: argparse.ArgumentParser, lengths: list[int], asked: list[str]) -> None:
    parser.set_defaults(base_settings={}, full_up_to=16 * K)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=lengths, help="tokens of a prompt"
    )
    parser.add_argument("--methods", nargs="+", default=asked, choices=sorted(served_ways({})))
    parser.add_argument(
        "--full-up-to", type=int, help="the longest prompt that full attention is asked to read"
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={},
        help="JSON: TokenSelect's settings, without `positions`",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument(
        "--minutes", type=float, help="stop after so many minutes, wherever the run is"
    )
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    parser.add_argument("--resume", action="store_true", help="go on with what the file has")
    parser.add_argument("--plots", type=Path, help="draw pictures into this folder")


def run(part: Part, ways: list[ServedWay], report: CellFile, args: argparse.Namespace) -> bool:
    """Ask all that is not in the report yet.

    Returns:
        Whether everything was asked before the time was over.
    """
    deadline = Deadline(args.minutes)
    todo = {way.name: [cell for cell in part.cells(way.name) if cell not in report] for way in ways}
    with counting_bar(Console()) as progress:
        task = progress.add_task("", total=sum(map(len, todo.values())))
        try:
            for way in ways:
                cells = todo[way.name]
                if not cells:
                    continue
                deadline.seconds_left()
                progress.update(task, description=f"{way.name}: starting the server")
                longest = max(cell.length for cell in cells)
                with server(part.model, way, longest, args.dtype) as started:
                    asker = Asker(started, deadline)
                    for cell in cells:
                        progress.update(task, description=_describe(cell))
                        begun = time.perf_counter()
                        result = part.ask(asker, cell)
                        seconds = round(time.perf_counter() - begun, 2)
                        report.add(cell, {**result, "seconds": seconds})
                        progress.advance(task)
        except OutOfTime:
            return False
    return True


def _describe(cell: Cell) -> str:
    where = "" if cell.depth is None else f" at {cell.depth:.0%}"
    return f"{cell.method}: {cell.task}{where} in {cell.length:,} tokens, {cell.number}"


def fixed(part: Part, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What every cell of a report has in common."""
    shared = {
        "part": args.part,
        "model": part.model_name,
        "dtype": args.dtype,
        "settings": TokenSelectConfig.from_mapping(settings).model_dump(exclude={"positions"}),
    }
    return shared | {
        name: getattr(args, name) for name in ("questions", "depths") if hasattr(args, name)
    }


def main() -> None:
    # Without this a polite `kill` would leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = arguments()
    settings = {**args.base_settings, **args.settings}
    ways = served_ways(settings)
    part = PARTS[args.part](args)
    try:
        report = open_cells(args.json, fixed(part, args, settings), args.resume)
    except CannotResume as error:
        sys.exit(str(error))
    finished = run(part, [ways[name] for name in args.methods], report, args)
    summary = part.summarize(report.cells)
    report.write(summary)
    console = Console(width=150)
    for table in part.tables(summary):
        console.print(table)
    if args.plots:
        for file in draw(args.part, summary, report.cells, args.plots):
            console.print(str(file))
    if not finished:
        console.print("The time was over before everything was asked; --resume goes on from here.")


if __name__ == "__main__":
    main()
