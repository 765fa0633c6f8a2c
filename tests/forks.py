"""vLLM engines, each in a fork of a process that has imported vLLM once."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

Job = dict[str, Any]
HANG = "HANG"


def run_in_forks(serve: Callable[..., Any], jobs: Sequence[Job], seconds: float = 600) -> None:
    """Print what `serve(**job)` returns for each job, in their order, each as a line of JSON."""
    for _, answer in answers_of_forks(serve, jobs, seconds=seconds):
        print(json.dumps(answer), flush=True)


def answers_of_forks(
    serve: Callable[..., Any], jobs: Sequence[Job], *, seconds: float, at_once: int = 1
) -> Iterator[tuple[int, Any]]:
    """Call `serve(**job)` for each job in a fork.

    vLLM's CPU platform starts one engine in a process: for a second one it looks for kernels in every
    module, and trips over numba's, which the first has loaded.

    Args:
        seconds: that a job may take.
        at_once: forks that run at the same time.

    Yields:
        the number of a job that ended and what it returned, which JSON can hold; `{"error": ...}` for
        one that ended by itself, or was ended because its time was over.
    """
    import compressed_tensors.offload  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    # vLLM looks at each kind of model in a process of its own, which takes it ten seconds.
    registry._run_in_subprocess = lambda look: look()

    fork = multiprocessing.get_context("fork")
    waiting = list(enumerate(jobs))
    running: dict[Any, tuple[int, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, job = waiting.pop(0)
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_send, args=(sender, serve, job))
            process.start()
            sender.close()
            running[receiver] = number, process, time.monotonic() + seconds
        first = min(deadline for _, _, deadline in running.values())
        ready = wait(list(running), max(0.0, first - time.monotonic()))
        for receiver, (number, process, deadline) in list(running.items()):
            if receiver in ready:
                answer = _received(receiver, process)
            elif time.monotonic() >= deadline:
                process.kill()
                process.join()
                answer = {"error": f"{HANG}: no answer within {seconds:.0f} s"}
            else:
                continue
            del running[receiver]
            receiver.close()
            yield number, answer


def _send(sender: Any, serve: Callable[..., Any], job: Job) -> None:
    sender.send_bytes(json.dumps(serve(**job)).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine that was refused half-way may not end by itself


def _received(receiver: Any, process: Any) -> Any:
    try:
        answer = json.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        return {"error": f"ended with {process.exitcode}"}
    process.join()
    return answer
