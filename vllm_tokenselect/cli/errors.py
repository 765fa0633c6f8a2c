"""What a command says when it cannot do what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


@contextmanager
def said_in_words() -> Iterator[None]:
    """What cannot be done is an error message and exit status 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        console = Console(stderr=True, highlight=False)
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
