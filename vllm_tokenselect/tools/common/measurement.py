"""How a command that measures servers runs: check everything, ask, then show what there is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from rich.console import Console

from vllm_tokenselect.tools.common.client import ServerError
from vllm_tokenselect.tools.common.refusals import refuse
from vllm_tokenselect.tools.common.server import ServerFailed
from vllm_tokenselect.tools.common.smollm2 import ModelUnavailable


class Measurement(Protocol):
    """A measurement whose options and servers were checked when it was made."""

    def run(self) -> None:
        """Ask everything.

        Raises:
            ServerError: when a server refuses a request or does not answer.
        """

    def show(self) -> None:
        """Write, print and draw what was measured so far."""

    def failures(self) -> str:
        """What failed in a measurement that ran to its end; empty if nothing did."""


def run_measurement(prepare: Callable[[ExitStack], Measurement], errors: Console) -> int:
    """Prepare a measurement, run it, and show what was measured, even if it broke off.

    Args:
        prepare: makes the measurement. The stack stops the servers that it started.
        errors: where messages go.

    Returns:
        Exit status: 0 when every request was answered, 2 for options or servers that cannot be used,
        1 when something failed.
    """
    # A polite `kill` ends the run, and the servers with it, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        try:
            measurement = prepare(stack)
        except (ModelUnavailable, ServerFailed) as error:
            return refuse(errors, str(error), 1)
        except (ServerError, ValueError, OSError) as error:
            return refuse(errors, str(error), 2)
        try:
            measurement.run()
        except (ServerError, ValueError) as error:
            return refuse(errors, str(error), 1)
        finally:
            measurement.show()
        failed = measurement.failures()
        return refuse(errors, failed, 1) if failed else 0
