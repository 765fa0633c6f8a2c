"""Errors of the commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from vllm_tokenselect.tools.common.refusals import refuse


@contextmanager
def said_in_words() -> Iterator[None]:
    """Turn an error into a message and exit status 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise typer.Exit(refuse(Console(stderr=True), str(error), 2)) from None
