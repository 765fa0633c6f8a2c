"""What the layers did, counted where they run and added up for the server's `/metrics`.

Kernels add to one tensor of the process, under CUDA graphs too; nobody reads it while serving but a
thread, which writes it to a file of a folder that all processes of the server share. Whoever serves
`/metrics` adds up the files. The metrics themselves are in `vllm_tokenselect.hooks.metrics`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import util
from pathlib import Path

import torch

from vllm_tokenselect.device_memory import make_lasting

# Rows of the sparse block table by what became of them, each counted once a layer; then the tokens
# that their queries attended to and those in their context.
ROW_KINDS = ("reselected", "reused", "dense")
COUNTERS = (*ROW_KINDS, "attended", "context")

DIRECTORY_VARIABLE = "TOKENSELECT_METRICS_DIR"
INTERVAL = 1.0  # seconds between two looks at the counters

_FILES = "tokenselect-*.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLabels:
    """Who counted: vLLM's own labels, the served model and the data-parallel rank, and which share.

    Every tensor-parallel rank counts its own heads' rows; pipeline-parallel ranks, each with layers of
    its own, are not told apart.
    """

    model_name: str
    engine: str
    tp_rank: str = "0"


def worker_counters(device: torch.device) -> torch.Tensor:
    """The process's counters on a device: int64 [5] in the order of `COUNTERS`, ever growing.

    Ask for it before CUDA graphs are captured: it is made by the first call and stays where it is.
    """
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return _counters_on(device)


@cache
def _counters_on(device: torch.device) -> torch.Tensor:
    def make() -> torch.Tensor:
        # Copied from the host, which waits until it is there, for whichever stream adds to it first.
        return torch.zeros(len(COUNTERS), dtype=torch.int64).to(device)

    return make_lasting(make)


def make_shared_directory() -> Path:
    """Make the folder through which workers report, for this process and those that it starts.

    The environment variable TOKENSELECT_METRICS_DIR names it. A temporary one is made where the
    variable is not set, and removed when the process that made it ends.

    Raises:
        OSError: when the folder that the user named cannot be made.
    """
    if (named := shared_directory()) is not None:
        named.mkdir(mode=0o700, parents=True, exist_ok=True)
        return named
    made = Path(tempfile.mkdtemp(prefix="tokenselect-metrics-"))
    os.environ[DIRECTORY_VARIABLE] = str(made)
    # Not in forks of this process, and below 0: when the processes that it started have ended.
    util.Finalize(None, shutil.rmtree, (made,), {"ignore_errors": True}, exitpriority=-1)
    return made


def shared_directory() -> Path | None:
    """The folder that `make_shared_directory` made here or in a parent; None when none did."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    return Path(named) if named else None


class CounterPublisher:
    """Writes counters about once a second, when they changed, and at the end of the process.

    Args:
        counters: int64 [5], of `worker_counters`.
        write: called in a thread with the counts; what raises an OSError is written again later.
    """

    def __init__(self, counters: torch.Tensor, write: Callable[[list[int]], None]) -> None:
        self._counters = counters
        self._write = write
        self._ending = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="tokenselect-counters", daemon=True)

    def start(self) -> None:
        """Start to write; not before CUDA graphs are captured, which other threads' calls disturb."""
        self._thread.start()
        # Unlike atexit's, it also runs at the end of a process that multiprocessing forked.
        util.Finalize(None, self.stop, exitpriority=0)

    def stop(self) -> None:
        """Write once more and end; the end of the process does it too."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        read = _reader(self._counters)
        written: list[int] | None = None
        ending = False
        while True:
            counts = read()
            if counts != written and self._try_to_write(counts):
                written = counts
            if ending:
                return
            ending = self._ending.wait(INTERVAL)

    def _try_to_write(self, counts: list[int]) -> bool:
        try:
            self._write(counts)
        except OSError as error:
            # A server that ends takes the folder with it.
            if not (self._warned or isinstance(error, FileNotFoundError)):
                logger.warning("TOKENSELECT: the counters in /metrics fall behind: %s", error)
                self._warned = True
            return False
        return True


def _reader(counters: torch.Tensor) -> Callable[[], list[int]]:
    """How to read the counters without holding up what adds to them."""
    if counters.device.type != "cuda":
        return counters.tolist
    host = torch.empty_like(counters, device="cpu", pin_memory=True)
    stream = torch.cuda.Stream(counters.device)  # type: ignore[no-untyped-call]
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def read() -> list[int]:
        with torch.cuda.stream(stream):
            host.copy_(counters, non_blocking=True)
            copied.record()
        copied.synchronize()
        return host.tolist()

    return read


class CounterFile:
    """One worker's file in the shared folder."""

    def __init__(self, directory: Path, labels: EngineLabels) -> None:
        self._path = directory / _FILES.replace("*", uuid.uuid4().hex)
        self._labels = asdict(labels)

    def write(self, counts: list[int]) -> None:
        """Replace the file's counts, so that a reader finds the old ones or these.

        Raises:
            OSError: when it cannot be written.
        """
        content = {"labels": self._labels, "counters": dict(zip(COUNTERS, counts, strict=True))}
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(self._path)


def read_counters(directory: Path) -> dict[EngineLabels, dict[str, int]]:
    """Every engine's counters, summed over the files of its workers.

    Files of others and what cannot be read are left out; a folder that is gone has no counters.
    """
    sums: dict[EngineLabels, dict[str, int]] = {}
    for path in directory.glob(_FILES):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            labels = EngineLabels(**{name: str(text) for name, text in content["labels"].items()})
            counts = {name: int(content["counters"][name]) for name in COUNTERS}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        total = sums.setdefault(labels, dict.fromkeys(COUNTERS, 0))
        for name, count in counts.items():
            total[name] += count
    return sums
