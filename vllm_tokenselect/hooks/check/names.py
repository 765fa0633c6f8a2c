"""Check every name of vLLM that the package uses, against the source of a release.

A type checker reads our rooms that know vLLM beside that source, and runs neither. It looks for every
module and name that is imported or replaced, every attribute of what has a type, and the parameters of what
is called or overridden. What concerns types alone (an optional value, a wider union) is left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_tokenselect.hooks.check import PACKAGE, REPOSITORY

# What pyrefly calls a name that is missing, or a call or an override that does not fit.
_KINDS = frozenset(
    {
        "bad-argument-count",
        "bad-override",
        "bad-override-mutable-attribute",
        "bad-override-param-name",
        "inconsistent-inheritance",
        "invalid-inheritance",
        "missing-argument",
        "missing-attribute",
        "missing-import",
        "missing-module-attribute",
        "missing-override-attribute",
        "missing-source",
        "unexpected-keyword",
        "unexpected-positional-argument",
        "unknown-name",
    }
)
# Argument types tell little, except for a function of vLLM that is handed to code which must not know vLLM.
_HANDED = ("bad-argument-type", "with type `VarlenFunction`")
# The hooks leave marks of their own on vLLM's objects; and pyrefly asks None, too, for an attribute of a
# value that may be None.
_EXPECTED = ("`_tokenselect", "`NoneType`")


class NoTypeChecker(Exception):
    """pyrefly did not run. The message says what to do."""


def check_names(source: Path) -> list[str]:
    """What the package uses of vLLM that the release does not have, one sentence each.

    Args:
        source: folder that holds the release's `vllm` package.

    Raises:
        NoTypeChecker: when pyrefly is not installed or fails.
    """
    settings = {
        "project-includes": [
            *(str(PACKAGE / room / "**/*.py") for room in ("backend", "engine", "hooks")),
            str(PACKAGE / "plugin.py"),
        ],
        # The release goes before a vLLM that is installed; everything else comes from this Python.
        "search-path": [str(REPOSITORY), str(source)],
        "python-interpreter-path": sys.executable,
        "enabled-ignores": ["pyrefly"],
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "pyrefly.toml")
        # TOML's strings and lists are JSON's.
        config.write_text(
            "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        )
        command = [sys.executable, "-m", "pyrefly", "check", "--config", str(config)]
        result = subprocess.run(
            [*command, "--output-format", "json"], capture_output=True, text=True, check=False
        )
    try:
        errors = json.loads(result.stdout)["errors"]
    except (ValueError, KeyError):
        raise NoTypeChecker(
            f"pyrefly did not run: {(result.stderr or result.stdout).strip()[-500:]}\n"
            "Install it with the extra `test`."
        ) from None
    return [
        f"{Path(error['path']).name}:{error['line']}: {_shorten(error['concise_description'])}"
        for error in errors
        if _concerns_a_name(error["name"], error["description"])
    ]


def _shorten(description: str) -> str:
    """Without the whole type of a function that is handed over."""
    return re.sub(r"^Argument `.{200,}` is", "What is handed over is", description)


def _concerns_a_name(kind: str, description: str) -> bool:
    if kind == _HANDED[0]:
        return _HANDED[1] in description
    return kind in _KINDS and not any(name in description for name in _EXPECTED)
