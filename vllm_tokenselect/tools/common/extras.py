"""Which extra a command needs, told before it does anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import typer
from rich.console import Console

from vllm_tokenselect.tools.common.refusals import refuse

# The modules that an extra brings. `tests/test_dependencies.py` compares it with pyproject.toml.
EXTRAS = {
    "bench": ("aiohttp", "matplotlib", "psutil", "scipy", "tenacity", "transformers"),
    "demo": ("accelerate", "aiohttp", "gguf", "tenacity", "transformers"),
    "eval": (
        *("aiohttp", "datasets", "lm_eval", "matplotlib", "nltk", "scipy", "tenacity"),
        *("transformers", "wonderwords"),
    ),
    "inspect": ("matplotlib", "scipy", "transformers"),
    "plan": ("transformers", "triton"),
}
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
}


def what_is_missing(extra: str) -> str | None:
    """Name the extra's modules that are not installed, and what installs them; None if none is missing."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} not installed: pip install 'vllm-tokenselect[{extra}]'"


def vllm_is_missing() -> str | None:
    """Say how to install vLLM; None if it is installed."""
    if find_spec("vllm") is not None:
        return None
    return (
        "vllm not installed: pip install 'vllm-tokenselect[cpu]', or 'vllm-tokenselect[gpu]' on a machine "
        "with a GPU"
    )


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
