"""How far something long is, on a terminal that can show it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


def open_console(*, stderr: bool = False) -> Console:
    """A console; without colors and bars, in plain lines, where `NO_COLOR` or `TERM=dumb` ask for it."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")
    return Console(stderr=stderr, force_terminal=False if plain else None)


def counting_bar(console: Console, *, disable: bool = False) -> Progress:
    """A bar with words, so many of so many, and the time; nothing at all if disabled."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=disable,
    )


def share_bar(console: Console, *, disable: bool = False) -> Progress:
    """A bar with words, the share that is done, and the time; nothing at all if disabled."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        disable=disable,
    )


@contextmanager
def counted(console: Console, total: int, first: str = "") -> Iterator[Callable[[str], None]]:
    """Draw a bar while the block runs; call what it yields after each step, with words for the step.

    Args:
        total: number of steps.
        first: words before the first step.
    """
    with counting_bar(console) as bars:
        task = bars.add_task(first, total=total)
        yield lambda words: bars.update(task, advance=1, description=words)
