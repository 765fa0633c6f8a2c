"""The command `tokenselect`: `demo` shows the project at work, `doctor` says what is wrong."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the console script `tokenselect`."""
    from vllm_tokenselect.tools.cli.app import app

    sys.exit(app())
