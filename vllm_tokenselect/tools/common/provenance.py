"""Where a result comes from: the command, the versions, the processor."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def typed_command(program: Iterable[str]) -> str:
    """The command line that started this process, as it can be typed again.

    Args:
        program: what stands before the arguments. Of a module, Python itself knows only the file.
    """
    return shlex.join([*program, *sys.argv[1:]])


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed distributions, by name."""
    return {package: installed_version(package) or "not installed" for package in packages}


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def now() -> str:
    """The date and time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
