"""The tests. Of parallel test processes (`pytest -n`) each takes cores of its own.

Threads of PyTorch, numba and vLLM's workers wait for each other at every barrier, so that programs
which share cores slow each other down many times over. It is done here because all of them count the
cores when they are imported, and whatever imports them imports this package first.
"""

import os


def _take_own_cores() -> None:
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{x}") for x in ("", "_COUNT"))
    if worker is None or count is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    number, share = int(worker.removeprefix("gw")), len(cores) // int(count)
    if share:
        os.sched_setaffinity(0, cores[number * share : (number + 1) * share])


_take_own_cores()
