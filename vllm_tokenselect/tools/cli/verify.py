"""The options of `tokenselect verify`."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option


def verify(
    url: Annotated[str, Argument(help="Server to verify: http://HOST:PORT", metavar="URL")],
    model: Annotated[
        str | None, Option(help="Name of the model. Default: the only one that it serves.")
    ] = None,
    api_key: Annotated[
        str | None, Option(help="The server's API key. Default: OPENAI_API_KEY, if it is set.")
    ] = None,
    length: Annotated[
        int, Option(min=1, help="Tokens of the long prompt, if the server takes as many.")
    ] = 8192,
    timeout: Annotated[float, Option(min=1, help="Seconds that a request may take.")] = 300.0,
    as_json: Annotated[bool, Option("--json", help="Print verdicts and figures as JSON.")] = False,
) -> None:
    """Ask a running server whether it selects, agrees with full attention, and how fast it is.

    Whether it selects is read from its /metrics, before and after a long prompt. A short prompt, of which
    nothing is selected, must be answered as with full attention. The exit status is 1 when a check failed.
    What a server cannot be asked, such as full attention with reassigned positions, is "unknown" and fails
    nothing.
    """
    from rich.console import Console

    from vllm_tokenselect.tools.verify.command import run_verify

    console = None if as_json else Console()
    raise typer.Exit(run_verify(url, model, api_key, length, timeout, console))
