"""The counters on their way from the workers to the server's `/metrics`.

Each worker has a thread that writes what was counted to a file, and whoever serves `/metrics` adds up the
files of all workers. The files are prometheus_client's own, so that several API servers, which all read the
folder PROMETHEUS_MULTIPROC_DIR, find them there. A single API server shows its process's registry instead:
it has a `TokenSelectCollector` that reads the same files in the folder TOKENSELECT_METRICS_DIR.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import util
from pathlib import Path

import torch
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_tokenselect.counters import Counter

DIRECTORY_VARIABLE = "TOKENSELECT_METRICS_DIR"
INTERVAL = 1.0  # seconds between two looks at the counters

_ROWS = (
    "vllm:tokenselect_rows",
    "Rows of the sparse block tables, over all layers: reselected, reused from the Selection Cache, shared "
    "with the layer that selected, or dense, which attend to their whole context.",
)
# The metric of each counter, `name` with `_total`, and its help.
_METRICS = {
    Counter.RESELECTED: _ROWS,
    Counter.REUSED: _ROWS,
    Counter.SHARED: _ROWS,
    Counter.DENSE: _ROWS,
    Counter.ATTENDED: (
        "vllm:tokenselect_tokens_attended",
        "Tokens attended to, summed over queries and layers.",
    ),
    Counter.CONTEXT: (
        "vllm:tokenselect_tokens_in_context",
        "Tokens in the context, summed over queries and layers.",
    ),
}
_FILES = "counter_tokenselect-*.db"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLabels:
    """Who counted: vLLM's own labels, the served model and the data-parallel rank, and which share.

    Every tensor-parallel rank counts its own heads' rows. Pipeline-parallel ranks, each with layers of
    its own, are summed.
    """

    model_name: str
    engine: str
    tp_rank: str = "0"

    def key(self, counter: Counter) -> str:
        """What prometheus_client calls the counter's value in a file."""
        name, help_text = _METRICS[counter]
        labels = asdict(self)
        if _METRICS[counter] is _ROWS:
            labels["kind"] = counter.name.lower()
        return mmap_key(name, f"{name}_total", list(labels), list(labels.values()), help_text)


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
        counters: int64 [len(Counter)], of `worker_counters`.
        write: called in a thread with the counts. Where it raises an OSError, it is called again later.
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
    """One worker's file in a folder, in prometheus_client's format.

    prometheus_client itself maps such a file into memory. In a folder that several machines share, others
    would see what is written to the map late or never, not every file system has maps, and a full disk
    would end the worker with SIGBUS. So the map is of memory alone, and its bytes are written as one file.
    """

    def __init__(self, directory: Path, labels: EngineLabels) -> None:
        self._path = directory / _FILES.replace("*", uuid.uuid4().hex)
        self._keys = [labels.key(counter) for counter in Counter]
        self._memory = os.memfd_create("tokenselect-counters")
        self._values = MmapedDict(f"/proc/self/fd/{self._memory}")  # type: ignore[no-untyped-call]

    def write(self, counts: list[int]) -> None:
        """Replace the file's counts, so that a reader finds the old ones or these.

        Raises:
            OSError: when it cannot be written.
        """
        for key, count in zip(self._keys, counts, strict=True):
            self._values.write_value(key, count, 0.0)  # type: ignore[no-untyped-call]
        content = os.pread(self._memory, os.fstat(self._memory).st_size, 0)
        (used,) = struct.unpack_from("i", content)  # the format begins with how much of it is used
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_bytes(content[:used])
        unfinished.replace(self._path)


class TokenSelectCollector:
    """The metrics of one API server, read from the shared folder whenever they are collected."""

    def describe(self) -> Iterator[CounterMetricFamily]:
        """The metrics without values."""
        for name, help_text in dict.fromkeys(_METRICS.values()):
            yield CounterMetricFamily(name, help_text)

    def collect(self) -> Iterable[Metric]:
        """The metrics with a value for each engine that has counted, none before the first has.

        Files of others and what cannot be read are left out; a folder that is gone has no counters.
        """
        directory = shared_directory()
        files = [] if directory is None else [str(path) for path in directory.glob(_FILES)]
        return MultiProcessCollector.merge(filter(_is_readable, files))  # type: ignore[no-untyped-call, no-any-return]


def _is_readable(path: str) -> bool:
    """Whether prometheus_client can read a file. One that it cannot would cost the whole of `/metrics`."""
    try:
        MultiProcessCollector.merge([path])  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, struct.error):
        return False
    return True
