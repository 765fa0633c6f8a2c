"""`tokenselect demo`: a real model answers questions about a long document, with and without selection."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

from rich.console import Console

from vllm_tokenselect.tools.common.client import ServerError
from vllm_tokenselect.tools.common.progress import counting_bar, share_bar
from vllm_tokenselect.tools.common.refusals import refuse
from vllm_tokenselect.tools.common.server import ServerFailed, VllmServer
from vllm_tokenselect.tools.common.smollm2 import MODEL_NAME, ModelUnavailable, ensure_smollm2
from vllm_tokenselect.tools.demo.asking import Answer, ask, in_turn
from vllm_tokenselect.tools.demo.document import FACTS, ships_log
from vllm_tokenselect.tools.demo.verdict import judge, print_answer, print_heading, print_question

# A budget that makes a document of 6,000 tokens sparse: a query reads at most 1,664 tokens and
# those of its own chunk.
SETTINGS = {"top_k": 1024, "n_init": 128, "n_local": 512, "query_chunk": 512}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(console: Console, *, port: int | None, keep: bool) -> int:
    """Run the demo from the model's download to the server's stop.

    Returns:
        The exit status: `verdict.judge`'s, or 1 when there was nothing to judge.
    """
    _leave_in_order()
    try:
        model = ensure_smollm2()
    except ModelUnavailable as error:
        return refuse(console, str(error), 1)
    server = VllmServer(
        model,
        settings=SETTINGS,
        port=port,
        extra_args=[
            *("--served-model-name", MODEL_NAME, "--max-num-seqs", "8"),
            "--enable-prompt-tokens-details",
        ],
    )
    try:
        _start(server, console)
        status = judge(_ask_all(server, console), console)
        if keep:
            _keep(server, console)
    except ServerFailed as error:
        return refuse(console, str(error), 1)
    except ServerError as error:
        status = refuse(console, str(error), 1)
    except BaseException:
        server.log_path.unlink(missing_ok=True)
        raise
    finally:
        _ignore_signals()
        server.stop()
    if status == 0 and not keep:
        server.log_path.unlink()
    else:
        console.print(f"The server's log: {server.log_path}", highlight=False, soft_wrap=True)
    return status


def _ignore_signals() -> None:
    """Stopping a server takes seconds, which a second Ctrl-C must not cut short."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def _leave_in_order() -> None:
    """End by an exception at Ctrl-C, `kill` or a closed terminal, so that the server is stopped."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        _ignore_signals()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for each in _SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:  # as `nohup` leaves it
            signal.signal(each, leave)


def _start(server: VllmServer, console: Console) -> None:
    shown = ["vllm", *server.command[server.command.index("serve") :]]
    console.print("$", shlex.join(shown), markup=False, highlight=False, soft_wrap=True)
    with share_bar(console, disable=not console.is_terminal) as bars:
        task = bars.add_task("Starting vLLM", total=1.0)

        def on_progress(stage: str, share: float) -> None:
            if bars.disable:
                console.print(f"Starting vLLM: {stage}", highlight=False)
            bars.update(task, description=f"Starting vLLM: {stage}", completed=share)

        server.start(on_progress=on_progress)


def _ask_all(server: VllmServer, console: Console) -> list[Answer]:
    """Ask every question both ways and print the answers as they come."""
    console.print(
        f"\nA ship's log of {len(ships_log().split()):,} words, and {len(FACTS)} questions about it, each "
        "asked on TOKENSELECT and with full attention. The server reads all of the log for two of them, "
        "both ways, and finds it in the prefix cache for the others.",
        highlight=False,
    )
    answers: list[Answer] = []
    print_heading(console)
    with counting_bar(console, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=2 * len(FACTS))
        for reading, fact, way in in_turn(FACTS):
            bars.update(task, description=f"Asking, {way}", refresh=True)
            if len(answers) % 2 == 0:
                print_question(fact, console)
            answers.append(ask(server, fact, way, reading))
            print_answer(answers[-1], console)
            bars.advance(task)
        bars.update(task, visible=False)
    return answers


def _keep(server: VllmServer, console: Console) -> None:
    pid, url = server.pid, f"{server.base_url}/v1/chat/completions"
    body = json.dumps({"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hello!"}]})
    console.print(f"The server is left running: process {pid}.")
    console.print("Ask it with")
    console.print(
        f"  curl {url} -H 'Content-Type: application/json' -d '{body}'",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"and stop it with\n  kill {pid}", highlight=False)
    server.detach()
