"""`tokenselect verify`: the verdicts on a running server, as a table or JSON, and an exit status."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict

from rich.console import Console

from vllm_tokenselect.tools.verify.checks import Report, Verification

_STYLE = {"pass": "green", "fail": "red", "unknown": "yellow"}


def run_verify(
    url: str,
    model: str | None,
    api_key: str | None,
    length: int,
    timeout: float,
    console: Console | None,
) -> int:
    """Check a server.

    Args:
        api_key: None for the one in the environment, or none.
        console: for the verdicts; None to print JSON.

    Returns:
        Exit status: 1 when a check failed, otherwise 0.
    """
    if api_key is not None:
        os.environ["OPENAI_API_KEY"] = api_key  # where the client looks for it
    report = asyncio.run(Verification(url, model, length, timeout).run())
    if console is None:
        print(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    else:
        _show(report, console)
    return int(not report.ok)


def _show(report: Report, console: Console) -> None:
    for check in report.checks:
        console.print(f"[{_STYLE[check.state]}]{check.state:7}[/]", check.name, end=": ")
        console.print(check.said, markup=False, highlight=False, soft_wrap=True)
    style, said = ("green", "serves as it should") if report.ok else ("red", "is not verified")
    console.print(f"{report.url} {said}.", style=style, highlight=False, soft_wrap=True)
