"""A step of a check in a process group of its own, so that nothing of it outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_POLL = 0.1  # seconds
_GRACE = 5.0  # seconds until a killed group is gone


def run_in_group(command: Sequence[str], log: Path, limit: float, cwd: Path) -> int | None:
    """Run a command, which adds to the log by itself, and show what it adds as it comes.

    Whatever the command started is killed when it ends, when its time is over, and when this process is
    interrupted.

    Args:
        limit: seconds.

    Returns:
        The exit status, None if the time was over.
    """
    with log.open("ab") as written, log.open("rb") as shown:
        shown.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            process_group=0,
        )
        end = time.monotonic() + limit
        try:
            while process.poll() is None and time.monotonic() < end:
                _show(shown.read())
                time.sleep(_POLL)
            return process.returncode
        finally:
            _kill_group(process)
            _show(shown.read())


def _show(new: bytes) -> None:
    print(new.decode(errors="replace"), end="", flush=True)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill every process of the group, and wait until they have given back what they hold."""
    end = time.monotonic() + _GRACE
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(_POLL)
