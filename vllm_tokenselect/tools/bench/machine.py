"""The machine: its processor, its GPUs, and the memory that a server takes."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import Any, Self

import psutil

from vllm_tokenselect.tools.common.provenance import cpu_name

_LOOK_EVERY = 0.5  # seconds between two looks at a server's processes


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and GPUs, for a report."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [
            {"name": name, "memory_mib": total, "driver": driver}
            for name, total, driver in _nvidia_smi("gpu", "name", "memory.total", "driver_version")
        ],
    }


def has_gpu() -> bool:
    """Whether nvidia-smi knows a GPU."""
    return bool(_nvidia_smi("gpu", "name"))


def device_mib(pid: int) -> float | None:
    """GPU memory, MiB, of a process and those that it started; None where nvidia-smi does not tell.

    In most containers it does not, because it sees other process ids there.
    """
    family = {str(process.pid) for process in _family(pid)}
    used = [
        float(mib)
        for owner, mib in _nvidia_smi("compute-apps", "pid", "used_memory")
        if owner in family and mib.replace(".", "").isdigit()
    ]
    return sum(used) if used else None


def _nvidia_smi(subject: str, *columns: str) -> list[list[str]]:
    """Rows of nvidia-smi's answer to a query; none where it is missing or fails."""
    query = f"--query-{subject}={','.join(columns)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == len(columns)]


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, as far as they live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class PeakMemory:
    """Peak memory of a server while the block runs.

    Args:
        pid: of the server; None if it runs elsewhere, so that nothing is measured.

    Attributes:
        worker_rss_mib: resident memory of its largest process, MiB.
        device_mib: GPU memory of all its processes after the block, MiB; processes never give any back.
    """

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.worker_rss_mib: float | None = None
        self.device_mib: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._pid is not None:
            self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._pid is None:
            return
        self._ended.set()
        self._thread.join()
        self._look(self._pid)
        self.device_mib = device_mib(self._pid)

    def _watch(self) -> None:
        assert self._pid is not None
        self._look(self._pid)
        while not self._ended.wait(_LOOK_EVERY):
            self._look(self._pid)

    def _look(self, pid: int) -> None:
        for process in _family(pid):
            try:
                rss = process.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                continue
            self.worker_rss_mib = max(self.worker_rss_mib or 0.0, rss)
