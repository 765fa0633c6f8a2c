"""How long does a text go on as with full attention, by the way a generated token attends?

    python -m benchmarks.continuation --json benchmarks/results/continuation.json --profiles FILE

A server with vLLM's own attention continues 30 texts (the Python documentation, which comes with Python;
3,000 to 6,000 tokens) by its 300 most likely tokens. A server of each other way is then made to generate
the same tokens, one after the other, and tells how likely it finds them: so all ways are asked the same, at
every token, and by the path that serves. From that follow

- KL: the divergence of a way's predictions from full attention's, over the five most likely tokens of both
  and the rest as one, which is never more than over all tokens;
- loss: by how much less likely full attention's own tokens become;
- other tokens: the share at which the way would have said another one, the first of them, and the texts
  without any, which the way continues word by word as full attention does.

"off" is full attention on this package's kernels: what rounding alone does. Every result is in the JSON
file at once; with --resume a run goes on where it was stopped, also with more ways or texts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.continuation.figures import compare, summarize, table
from benchmarks.continuation.served import Asked, Continuation, continue_all, start
from benchmarks.continuation.ways import FULL, ServedWay, served_ways
from benchmarks.report import SMOLLM2, open_cells
from vllm_tokenselect.tools.common.progress import counted
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.common.text import document
from vllm_tokenselect.tools.evaluate.cells import CannotResume, Cell, CellFile

TASK = "text"


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--ways", nargs="+", help="how to attend; all, if left out, and full attention always"
    )
    parser.add_argument(
        "--profiles", type=Path, nargs="+", default=[], help="files whose settings are ways, too"
    )
    parser.add_argument("--texts", type=int, default=30, help="texts that are continued")
    parser.add_argument("--tokens", type=int, default=300, help="generated tokens of each")
    parser.add_argument("--least", type=int, default=3000, help="tokens of a text, at least")
    parser.add_argument("--most", type=int, default=6000, help="tokens of a text, at most")
    parser.add_argument("--first", type=int, default=3000, help="number of the first text")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    parser.add_argument("--resume", action="store_true", help="go on with what the file has")
    args = parser.parse_args(command)
    known = served_ways(args.profiles)
    args.ways = [name for name in args.ways or known if name != FULL]
    if unknown := set(args.ways) - known.keys():
        parser.error(f"there is no way {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return args


class Texts:
    """The texts, by number."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any) -> None:
        self._args, self._tokenizer = args, tokenizer
        self.numbers = range(args.first, args.first + args.texts)

    def length(self, number: int) -> int:
        return random.Random(number).randint(self._args.least, self._args.most)

    def cell(self, way: str, number: int) -> Cell:
        return Cell(way, TASK, self.length(number), number)

    def asked(self, number: int, forced: list[int] | None) -> Asked:
        return Asked(number, document(self._tokenizer, number, self.length(number)), forced)


def read_full(report: CellFile) -> dict[int, Continuation]:
    """Full attention's continuations by number of the text."""
    return {
        cell["number"]: Continuation(
            cell["tokens"], [{int(t): lp for t, lp in each.items()} for each in cell["likely"]]
        )
        for cell in report.cells
        if cell["method"] == FULL
    }


def ask(
    model: Path, way: ServedWay, texts: Texts, report: CellFile, args: argparse.Namespace
) -> None:
    """Let a server continue all texts that the report does not have yet."""
    missing = [number for number in texts.numbers if texts.cell(way.name, number) not in report]
    if not missing:
        return
    full = {} if way.name == FULL else read_full(report)
    asked = [texts.asked(n, full[n].tokens if full else None) for n in missing]

    def keep(text: Asked, said: Continuation) -> None:
        if full:
            result = compare(full[text.number], said) | {"settings": way.settings}
        else:
            likely = [{t: round(lp, 4) for t, lp in each.items()} for each in said.likely]
            result = {"tokens": said.tokens, "likely": likely}
        report.add(texts.cell(way.name, text.number), result)
        advance(way.name)

    with (
        counted(Console(), len(missing), way.name) as advance,
        start(model, way, args.dtype, args.most + args.tokens) as server,
    ):
        asyncio.run(continue_all(server, way, asked, args.tokens, keep))


def main() -> None:
    args = arguments()
    fixed = {
        "model": SMOLLM2,
        **{name: getattr(args, name) for name in ("dtype", "tokens", "least", "most")},
    }
    try:
        report = open_cells(args.json, fixed, args.resume)
    except CannotResume as error:
        sys.exit(str(error))
    model = ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 10**9  # its warning tells nothing here
    texts, ways = Texts(args, tokenizer), served_ways(args.profiles)
    for name in (FULL, *args.ways):
        ask(model, ways[name], texts, report, args)
    summary = summarize(report.cells, args.tokens)
    report.write(summary)
    Console(width=150).print(table(summary, args.tokens))


if __name__ == "__main__":
    main()
