"""Say in words what cannot be done."""

from __future__ import annotations

from rich.console import Console


def refuse(console: Console, message: str, status: int) -> int:
    """Print what is wrong, as it is, and return the exit status."""
    console.print(message, style="red", markup=False, soft_wrap=True, highlight=False)
    return status
