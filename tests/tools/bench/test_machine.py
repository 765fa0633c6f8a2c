"""Memory is that of the server's processes while they are asked, and of a GPU what nvidia-smi tells."""

import os
import subprocess
import sys
import time

import pytest

from vllm_tokenselect.tools.bench import machine
from vllm_tokenselect.tools.bench.machine import PeakMemory, describe_machine, device_mib

# A server, and a worker that has 200 MiB until it is told to give them back.
WORKER = (
    "import sys; kept = b'x' * 200 * 2**20; print(1, flush=True); sys.stdin.readline(); del kept; "
    "print(0, flush=True); sys.stdin.readline()"
)
SERVER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}])"


@pytest.fixture
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        process.stdout.readline()
        yield process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_the_most_memory_of_the_largest_process_is_kept(server):
    with PeakMemory(server.pid) as memory:
        deadline = time.monotonic() + 30
        while (memory.worker_rss_mib or 0) < 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.stdin.write(b"\n")
        server.stdin.flush()
        server.stdout.readline()
    assert 200 < memory.worker_rss_mib < 300
    with PeakMemory(server.pid) as later:
        pass
    assert later.worker_rss_mib < 100


def test_of_a_server_that_runs_elsewhere_nothing_is_known():
    with PeakMemory(None) as memory:
        pass
    assert (memory.worker_rss_mib, memory.device_mib) == (None, None)


def test_a_server_that_ends_meanwhile_harms_nobody(server):
    with PeakMemory(server.pid):
        os.killpg(server.pid, 9)
        server.wait()


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Have nvidia-smi say something."""

    def says(text: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return says


def test_gpu_memory_is_summed_over_the_servers_processes(server, nvidia_smi):
    (worker,) = machine._family(server.pid)[1:]
    nvidia_smi(f"{worker.pid}, 1200\n1, 500\n{server.pid}, 34\n{worker.pid}, 1000")
    assert device_mib(server.pid) == 2234.0


@pytest.mark.parametrize(
    ("text", "status"),
    [("1, 500", 0), ("OWN, [N/A]", 0), ("OWN, 500", 9), ("", 0)],
    ids=["other processes", "not told", "no driver", "nothing"],
)
def test_gpu_memory_that_is_not_told_is_not_zero(nvidia_smi, text, status):
    nvidia_smi(text.replace("OWN", str(os.getpid())), status)
    assert device_mib(os.getpid()) is None


def test_the_machine_is_described(nvidia_smi):
    nvidia_smi("NVIDIA H200, 143771, 580.1")
    found = describe_machine()
    assert found["gpus"] == [{"name": "NVIDIA H200", "memory_mib": "143771", "driver": "580.1"}]
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
