"""Do something after this process has ended, however it ended: also when it was killed."""

from __future__ import annotations

import subprocess


class Watcher:
    """A shell of its own session that runs a script as soon as this process is gone.

    It reads from a pipe that only this process holds open. When the pipe ends without a line, nobody is
    left to call `dismiss`.

    Args:
        script: for `sh`; takes the arguments as `$1`, `$2` ...
        arguments: for the script.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._shell = subprocess.Popen(
            ["sh", "-c", f"read -r line || {{\n{script}\n}}", "watcher", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C does not reach it
        )

    def dismiss(self) -> None:
        """End the watcher without running its script."""
        self._shell.communicate(b"done\n")


def watch_group(group: int) -> Watcher:
    """End a process group when this process is gone, killing what does not go within five seconds."""
    return Watcher(
        'kill -s TERM -- "-$1"; for i in 1 2 3 4 5; do kill -s 0 -- "-$1" || exit; sleep 1; done; '
        'kill -s KILL -- "-$1"',
        str(group),
    )
