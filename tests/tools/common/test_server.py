"""A server that does not start says why, and a server that is stopped leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_tokenselect.tools.common.server import ServerFailed, VllmServer, free_port

# Stands for `vllm serve`: answers /health, and has a worker that ignores polite signals.
ANSWERS = """
import http.server, os, signal, subprocess, sys
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", code])
print("worker", worker.pid, "(EngineCore) Initializing a V1 LLM engine (v0)", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server_that_runs(code: str, tmp_path: Path) -> VllmServer:
    server = VllmServer("model", log_path=tmp_path / "server.log")
    server.command = [sys.executable, "-c", code, str(server.port)]
    return server


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path):
    server = server_that_runs("print('tokenselect: top_q: no such setting'); exit(3)", tmp_path)
    with pytest.raises(ServerFailed, match=r"status 3[\s\S]*top_q: no such setting"):
        server.start(timeout=20)


def test_a_server_that_is_never_ready_is_ended(tmp_path):
    server = server_that_runs(
        "import os, time; print(os.getpid(), flush=True); time.sleep(600)", tmp_path
    )
    with pytest.raises(ServerFailed, match="took over 2 s"):
        server.start(timeout=2)
    assert not is_running(int(server.log().split()[0]))


def test_stop_leaves_no_process_of_the_server_behind(tmp_path):
    server = server_that_runs(ANSWERS, tmp_path)
    stages = []
    server.start(timeout=20, on_progress=lambda stage, share: stages.append((stage, share)))
    leader, worker = server.pid, int(server.log().split()[1])
    assert is_running(worker)
    server.stop(grace=1)
    assert not is_running(leader)
    assert not is_running(worker)
    assert stages[-1] == ("API ready", 1.0)
    server.stop()  # nothing left to do


def test_a_detached_server_outlives_the_with_block(tmp_path):
    with server_that_runs(ANSWERS, tmp_path) as server:
        process = server._process
        server.detach()
    assert process is not None
    assert is_running(process.pid)
    server._process = process
    server.stop(grace=1)


# Stands for a server that takes its time to end: longer than a run leaves its workers.
BUSY = f"""
import signal
import socket
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{ANSWERS}
"""

# Tests that have a server each, as workers of pytest-xdist; they tell its processes, and wait to be ended.
SERVING_TESTS = """
import time
from pathlib import Path
import pytest
from tests.tools.common.test_server import BUSY, server_that_runs

@pytest.mark.parametrize("name", ["one", "other"])
def test_serves(name, tmp_path):
    with server_that_runs(BUSY, tmp_path) as server:
        found = Path(__file__).with_name(f"{name}.tmp")
        found.write_text(f"{server.pid} {server.log().split()[1]}")
        found.rename(found.with_suffix(".pids"))
        time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_servers_of_tests_end_with_the_run_however_it_ends(how, tmp_path):
    (tmp_path / "test_serving.py").write_text(SERVING_TESTS)
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "test_serving.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Not ignored, as whatever a shell starts in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pids"))) == 2, 60)
        pids = [int(pid) for told in tmp_path.glob("*.pids") for pid in told.read_text().split()]
        assert len(pids) == 4
        assert all(map(is_running, pids))
        os.killpg(run.pid, how)  # Ctrl-C reaches all processes of a terminal's foreground
        wait_until(lambda: not any(map(is_running, pids)), 40)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_detached_server_outlives_the_process_that_started_it(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from tests.tools.common.test_server import ANSWERS, server_that_runs\n"
        "server = server_that_runs(ANSWERS, Path.cwd())\n"
        "server.start(timeout=60)\n"
        "print(server.pid, flush=True)\n"
        "server.detach()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        check=True,
    )
    leader = int(ended.stdout)
    time.sleep(1)
    try:
        assert is_running(leader)
    finally:
        os.killpg(leader, signal.SIGKILL)


def test_settings_and_backend_reach_the_command_line():
    server = VllmServer("model", settings={"top_k": 7}, extra_args=["--max-num-seqs", "8"])
    arguments = server.command
    assert arguments[arguments.index("--attention-backend") + 1] == "TOKENSELECT"
    given = json.loads(arguments[arguments.index("--additional-config") + 1])
    assert given == {"tokenselect": {"top_k": 7}}
    assert arguments[-2:] == ["--max-num-seqs", "8"]


def test_what_the_user_set_goes_before_the_defaults(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "16")
    assert VllmServer("model").env["VLLM_CPU_KVCACHE_SPACE"] == "16"
    assert (
        VllmServer("model", env={"VLLM_CPU_KVCACHE_SPACE": "1"}).env["VLLM_CPU_KVCACHE_SPACE"]
        == "1"
    )


def test_a_small_machine_gives_all_its_cpus_to_the_worker(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert VllmServer("model").env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in VllmServer("model").env


def test_a_port_is_free_and_none_that_the_system_gives_to_connections() -> None:
    ports = {free_port() for _ in range(20)}

    for port in ports:
        assert 1024 < port < 32_768
        with socket.create_server(("127.0.0.1", port)):
            pass
    assert len(ports) > 1
