"""Start `vllm serve` as a process of its own, follow its start, and stop all of it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from vllm_tokenselect.tools.common.watcher import Watcher, watch_group

# What vLLM's log says on the way up: pattern, what it means, share of the start that is behind it.
_STAGES = (
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine", 0.3),
    (re.compile(r"Starting to load model"), "loading weights", 0.55),
    (re.compile(r"Loading weights took"), "weights loaded", 0.65),
    (re.compile(r"GPU KV cache size|CPU KV cache size"), "KV cache laid out, warming up", 0.75),
    (re.compile(r"init engine \("), "starting the API", 0.9),
    (re.compile(r"Application startup complete"), "API ready", 1.0),
)

# Up to this many CPUs, one that vLLM keeps free for its API server is a large share of the machine.
_FEW_CPUS = 4

# Below the range from which systems choose a connection's own port.
_PORTS = range(10_000, 32_000)

OnProgress = Callable[[str, float], None]


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time. The message ends with its last log lines."""


class VllmServer:
    """One `vllm serve`, in a process group of its own, which ends with this process, however that ends.

        with VllmServer(model, settings={"top_k": 1024}) as server:
            Client(Endpoint(server.base_url, "model"))

    Args:
        model: model folder or name.
        backend: value of `--attention-backend`; None leaves the choice to vLLM.
        settings: TokenSelect's settings, for `--additional-config`.
        port: None takes a free one.
        enforce_eager: pass `--enforce-eager`. Without it vLLM compiles the model first, which takes
            about a minute on two cores.
        extra_args: more arguments for `vllm serve`.
        env: environment variables; they override the defaults and those of this process.
        log_path: where the server's output goes; None makes a temporary file, which is kept.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        backend: str | None = "TOKENSELECT",
        settings: Mapping[str, Any] | None = None,
        port: int | None = None,
        enforce_eager: bool = True,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
    ) -> None:
        self.model = str(model)
        self.port = port or free_port()
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if backend is not None:
            self.command += ["--attention-backend", backend]
        if settings is not None:
            self.command += ["--additional-config", json.dumps({"tokenselect": dict(settings)})]
        if enforce_eager:
            self.command.append("--enforce-eager")
        self.command += extra_args
        self.env = {**_defaults(), **os.environ, **(env or {})}
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: Watcher | None = None

    @property
    def base_url(self) -> str:
        """Where the server listens; the OpenAI API is below `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        """File with everything that the server writes."""
        if self._log_path is None:
            handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
            os.close(handle)
            self._log_path = Path(name)
        return self._log_path

    @property
    def pid(self) -> int:
        """Process id of `vllm serve`, which is also the id of its process group."""
        if self._process is None:
            raise ServerFailed("the server has not been started")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def start(self, timeout: float = 600.0, on_progress: OnProgress | None = None) -> None:
        """Start the server and wait until it answers.

        Args:
            timeout: seconds to wait.
            on_progress: called with what the server does and the share of the start behind it.

        Raises:
            ServerFailed: when it ends or is not ready in time; nothing of it is left running.
        """
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watcher = watch_group(self._process.pid)
        try:
            self._wait_until_ready(timeout, on_progress)
        except BaseException:
            self.stop(grace=5.0)
            raise

    def _wait_until_ready(self, timeout: float, on_progress: OnProgress | None) -> None:
        assert self._process is not None
        deadline = time.monotonic() + timeout
        reached = -1
        while not self._answers():
            if (status := self._process.poll()) is not None:
                raise ServerFailed(f"vllm serve ended with status {status}. {self._last_words()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"vllm serve took over {timeout:.0f} s. {self._last_words()}")
            if on_progress is not None:
                stage = self._stage()
                if stage > reached:
                    reached = stage
                    on_progress(*_STAGES[stage][1:])
            time.sleep(0.25)
        if on_progress is not None:
            on_progress(*_STAGES[-1][1:])

    def stop(self, grace: float = 15.0) -> None:
        """Stop the server and every process that it started; does nothing when none is left.

        Args:
            grace: seconds that it gets to end by itself before it is killed.
        """
        process = self._process
        if process is None:
            return
        for signal_number, seconds in ((signal.SIGINT, grace), (signal.SIGTERM, grace / 3)):
            # The server itself only: it ends its engine and workers in order.
            with suppress(ProcessLookupError):
                process.send_signal(signal_number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                break
        _end_group(process)
        self.detach()

    def detach(self) -> None:
        """Leave the server running: neither `stop` nor the end of this process ends it any more."""
        self._process = None
        if self._watcher is not None:
            self._watcher.dismiss()
            self._watcher = None

    def log(self) -> str:
        """Everything that the server wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _stage(self) -> int:
        """Index of the last stage that the log speaks of, -1 before the first."""
        log = self.log()
        return max(
            (i for i, (pattern, *_) in enumerate(_STAGES) if pattern.search(log)), default=-1
        )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=2.0) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _last_words(self, lines: int = 30) -> str:
        last = self.log().rstrip().splitlines()[-lines:]
        return f"The end of its log ({self.log_path}):\n" + "\n".join(last)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now.

    A server binds its port some ten seconds after the port was chosen. Until then the system gives the
    ports of its own range (on Linux from 32768 on) to any connection, so the port is taken from below.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _defaults() -> dict[str, str]:
    """Environment variables of the server that the user has not set."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) <= _FEW_CPUS:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
    return defaults


def _end_group(leader: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """End what is left of the leader's process group, killing what does not go within `grace`."""
    started = time.monotonic()
    # Ended processes that nobody reaps (a container without an init) stay in the group: give up on
    # those, they hold nothing.
    while (elapsed := time.monotonic() - started) < 2 * grace:
        try:
            os.killpg(leader.pid, signal.SIGTERM if elapsed < grace else signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        leader.poll()
        time.sleep(0.1)
    leader.wait()
