"""How often SmolLM2 finds what its prompt says, by the way it attends, at one budget of attended tokens.

    python -m benchmarks.accuracy --json benchmarks/results/accuracy.json --plots benchmarks/results

Eight numbers stand in one long real text (the Python documentation, which comes with Python), and each is
asked for. The model reads a text once for all of its questions, in a plain PyTorch forward of the
method's definition (the tests show that servers compute the same); every generated token selects for
itself, or an anchor selects for it. An answer is right if the model says all digits and no more. Its
loss, the negative log-likelihood of its digits given those before them, tells more than right and wrong
do. Both are compared with full attention's on the same questions, with 95 % intervals over texts
(Student's t).

A budget of 1,024 means: a chunk of queries attends to 1,024 tokens before it (32 sink, 256 local and 736
selected). Every result is in the JSON file at once. With --resume a run goes on where it was stopped,
also with more lengths, ways, budgets or samples than before. Texts are numbered from --first on, so that
what was tuned on some is reported on others.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from benchmarks.accuracy.figures import draw, summarize, table
from benchmarks.accuracy.questions import QUESTIONS, digits_only
from benchmarks.accuracy.ways import FULL, Way, find_way, ways
from benchmarks.report import SMOLLM2, open_cells
from vllm_tokenselect.tools.common.hidden import HiddenPrompt, needle_prompts
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.common.text import encode
from vllm_tokenselect.tools.evaluate.cells import CannotResume, Cell
from vllm_tokenselect.tools.inspect.model import DiagnosedModel

K = 1024
MAIN = ("full", "ours", "dense 2", "paper", "sink+local", "random")
SHARED = 512  # tokens, in multiples of which a text is read once for all of its questions


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["end"], choices=QUESTIONS, help="where the question stands"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1280, 2304, 4352, 7936],
        help="tokens of a prompt",
    )
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[512, K, 2 * K],
        help="tokens attended before a chunk",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=list(MAIN),
        help=f"how to attend: {', '.join(names())}; or by layers, as 'dense 2', 'anchors 4' (every "
        "fourth), 'anchors 2 6 14 17 21' (these), 'dense 2 anchors 4'",
    )
    parser.add_argument(
        "--samples", type=int, default=104, help="questions for each length and way, at least"
    )
    parser.add_argument("--questions", type=int, default=8, help="questions about one text")
    parser.add_argument("--first", type=int, default=1000, help="number of the first text")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    parser.add_argument("--resume", action="store_true", help="go on with what the file has")
    parser.add_argument("--plots", type=Path, help="draw pictures into this folder")
    args = parser.parse_args(command)
    for name in args.ways:
        try:
            find_way(name, K)
        except KeyError:
            parser.error(f"--ways: there is no way {name!r}; see --help")
    return args


def names() -> list[str]:
    """Names of the ways, without their budgets."""
    return [name.removeprefix(f"{K} ") for name in ways([K])]


def asked_ways(args: argparse.Namespace, length: int) -> list[Way]:
    """The ways at all budgets that leave something of so long a prompt out."""
    budgets = [budget for budget in args.budgets if budget < length]
    wanted = [find_way(FULL, K)] if FULL in args.ways else []
    wanted += [find_way(name, budget) for budget in budgets for name in args.ways if name != FULL]
    return wanted


class Reader:
    """Asks the model, text by text."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = ensure_smollm2()
        self._model = DiagnosedModel(str(folder), dtype=args.dtype)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._tokenizer.model_max_length = 10**9  # its warning tells nothing here
        self._digits = digits_only(self._tokenizer)
        self._questions = args.questions

    def ask(self, way: Way, cell: Cell) -> dict[str, Any]:
        """What comes of all questions about a text."""
        wording = QUESTIONS[cell.task]
        prompts = needle_prompts(
            self._tokenizer, cell.length, cell.number, self._questions, wording
        )
        begun = time.perf_counter()
        shared = _shared([prompt.tokens for prompt in prompts]) // SHARED * SHARED
        beginning = None
        if shared:
            attention = way.attention(cell.length, 0, cell.number)
            beginning = self._model.read(prompts[0].tokens[:shared], attention)
        answers = [self._answer(way, prompt, beginning, cell.number) for prompt in prompts]
        return {"answers": answers, "seconds": round(time.perf_counter() - begun, 2)}

    def _answer(
        self, way: Way, prompt: HiddenPrompt, beginning: Any, number: int
    ) -> dict[str, Any]:
        code = encode(self._tokenizer, prompt.expected)
        # The digits are read one by one as if the model had said them; a last token, which counts for
        # nothing, makes room for what it says behind them.
        tokens = [*prompt.tokens, *code, 0]
        count = len(code) + 1
        attention = way.attention(len(tokens), count, number)
        logits = self._model.logits(tokens, count, attention, beginning).cpu()
        likeliest = logits.argmax(dim=-1).tolist()
        loss = -logits[:-1].log_softmax(dim=-1)[range(len(code)), code].mean()
        return {
            "depth": round(prompt.depth, 4),
            "right": likeliest[:-1] == code and likeliest[-1] not in self._digits,
            "loss": round(float(loss), 4),
        }


def _shared(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with alike."""
    for index, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return index
    return min(map(len, sequences))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    fixed = {
        "model": SMOLLM2,
        "dtype": args.dtype,
        "questions": args.questions,
        "first": args.first,
    }
    try:
        report = open_cells(args.json, fixed, args.resume)
    except CannotResume as error:
        sys.exit(str(error))
    todo = [
        (way, cell)
        for length in args.lengths
        for number in range(args.first, args.first + ceil(args.samples / args.questions))
        for task in args.tasks
        for way in asked_ways(args, length)
        if (cell := Cell(way.name, task, length, number)) not in report
    ]
    if todo:
        reader = Reader(args)
        for way, cell in track(todo, "texts"):
            report.add(cell, reader.ask(way, cell))
    summary = summarize(report.cells)
    report.write(summary)
    console = Console(width=150)
    console.print(table(summary))
    if args.plots:
        for file in draw(summary, args.plots):
            console.print(str(file))


if __name__ == "__main__":
    main()
