"""How the demo shows its answers, and whether it succeeded."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.markup import escape

from vllm_tokenselect.tools.demo.asking import FULL, OURS, Answer
from vllm_tokenselect.tools.demo.document import Fact, depth
from vllm_tokenselect.tools.demo.figures import Attended

_WIDTH = 15  # of an answer


def print_heading(console: Console) -> None:
    """Print the headings of `print_answer`'s columns."""
    columns = (
        f"{'':22}{'answer':<{_WIDTH}}{'':5} {'first token':>12} {'read':>7}   attended per query"
    )
    _print(console, f"\n[bold]depth  question[/]\n[dim]{columns}[/]")


def print_question(fact: Fact, console: Console) -> None:
    """Print a question and where in the document its answer stands."""
    _print(console, f"[bold]{depth(fact):>4.0%}   {fact.question}[/]")


def print_answer(answer: Answer, console: Console) -> None:
    """Print what was said, whether it is right, when it came, and how much was read and attended to."""
    said = " ".join(answer.text.split())[:_WIDTH]
    verdict = "[green]right[/]" if answer.is_right else "[red]wrong[/]"
    per_query = answer.attended
    attended = f"{per_query.mean_attended:,.0f} of {per_query.mean_context:,.0f} tokens"
    padded = escape(f"{said:<{_WIDTH}}")
    _print(
        console,
        f"       {answer.way:<15}{padded}{verdict} {answer.first_token:>10.2f} s "
        f"{answer.read:>7,}   {attended}",
    )


def judge(answers: Sequence[Answer], console: Console) -> int:
    """Print the summary.

    Returns:
        The exit status: 0 when TOKENSELECT finds at least as many answers as full attention less one, and
        full attention half of them, else 1.
    """
    ours, full = ([a for a in answers if a.way == way] for way in (OURS, FULL))
    found, found_full = (sum(a.is_right for a in some) for some in (ours, full))
    _print(
        console,
        f"\n[bold]TOKENSELECT found {found} of {len(ours)}, full attention {found_full}.[/]",
    )
    most = max(answer.read for answer in answers)
    shares = []
    for what, reads in (("reading the log", True), ("with the log in the prefix cache", False)):
        some, some_full = (
            [answer for answer in all_of if (2 * answer.read > most) == reads]
            for all_of in (ours, full)
        )
        shares.append(sum((answer.attended for answer in some), Attended(0, 0, 0)).share)
        seconds, seconds_full = ([answer.first_token for answer in x] for x in (some, some_full))
        if seconds and seconds_full:
            _print(
                console,
                f"Median time to first token {what}: {median(seconds):.2f} s and "
                f"{median(seconds_full):.2f} s ([bold]{median(seconds_full) / median(seconds):.2f}x[/]).",
            )
    _print(
        console,
        "TOKENSELECT attended to {:.0%} of the tokens in context where it read the log, and to {:.0%} "
        "where the log was in the prefix cache.".format(*shares),
    )
    if 2 * found_full < len(full):
        _print(
            console, "[red]Full attention finds too little: the model or the server is broken.[/]"
        )
        return 1
    if found < found_full - 1:
        _print(console, "[red]TOKENSELECT lost more than one answer.[/]")
        return 1
    return 0


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
