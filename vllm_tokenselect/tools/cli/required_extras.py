"""Which extra a command needs, checked before the command does anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from vllm_tokenselect.tools.common.extras import vllm_is_missing, what_is_missing
from vllm_tokenselect.tools.common.refusals import refuse

# Commands that start a server in any case; `bench` may ask two that run somewhere.
STARTS_A_SERVER = {"demo"}
# `doctor` says itself what is missing.
EXTRA_OF_COMMAND = {
    "bench": "bench",
    "demo": "demo",
    "doctor": None,
    "eval": "eval",
    "inspect": "inspect",
    "plan": "plan",
    "tune": "inspect",
    "verify": "verify",
}


def check_extras_first(app: typer.Typer) -> None:
    """Let every command of `app` end with status 2 where its extra is not installed."""
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        if (extra := EXTRA_OF_COMMAND[name]) is not None:
            info.callback = _checked(info.callback, extra, name in STARTS_A_SERVER)


def _checked(command: Callable[..., Any], extra: str, with_server: bool) -> Callable[..., Any]:
    @functools.wraps(command)
    def checked(*args: Any, **options: Any) -> Any:
        if sentence := (with_server and vllm_is_missing()) or what_is_missing(extra):
            raise typer.Exit(refuse(Console(stderr=True), sentence, 2))
        return command(*args, **options)

    return checked
