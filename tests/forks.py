"""vLLM engines one after the other, each in a fork of a process that has imported vLLM once."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any


def run_in_forks(serve: Callable[..., None], jobs: Iterable[dict[str, Any]]) -> None:
    """Call `serve(**job)` for each job in a fork, which prints what came of it; waits for each.

    vLLM's CPU platform starts one engine in a process: for a second one it looks for kernels in every
    module, and trips over numba's, which the first has loaded.
    """
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    # vLLM looks at each kind of model in a process of its own, which takes it ten seconds.
    registry._run_in_subprocess = lambda look: look()

    for job in jobs:
        fork = multiprocessing.get_context("fork").Process(target=serve, kwargs=job)
        fork.start()
        fork.join()
        if fork.exitcode:
            print(json.dumps({"error": f"ended with {fork.exitcode}"}), flush=True)
