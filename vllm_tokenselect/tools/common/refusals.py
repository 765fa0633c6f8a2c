"""What cannot be done, said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


def refuse(console: Console, message: str, status: int) -> int:
    """Print what is wrong, as it is, and return the exit status."""
    console.print(message, style="red", markup=False, soft_wrap=True, highlight=False)
    return status


@contextmanager
def said_in_words() -> Iterator[None]:
    """What cannot be done is an error message and exit status 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise typer.Exit(refuse(Console(stderr=True), str(error), 2)) from None
