"""Two ranks on a real server, by vLLM's processes, by Ray, and on two hosts: they say what one says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
import psutil
import pytest

from tests.models.divisible import with_divisible_heads
from tests.models.shortened import first_layers
from tests.oracle.cases import CACHED_SETTINGS
from tests.server.conftest import FP32, SMALL_WORKERS, Client, Completion, serving
from tests.server.test_client import wait_until
from tests.server.test_killed_worker import is_alive
from tests.server.test_start import start_logs
from tests.server.two_hosts import RayCluster, two_hosts

pytestmark = pytest.mark.server

LAYERS = 8
TOGETHER = {**asdict(CACHED_SETTINGS), "vote": "global"}
APART = {**asdict(CACHED_SETTINGS), "vote": "local"}
RAY_ON_CPU = Path(__file__).parent.parent / "ray_on_cpu"
RANKS: dict[str, dict[str, str]] = {
    "mp": SMALL_WORKERS,
    "ray": {
        **SMALL_WORKERS,
        "RAY_OVERRIDE_RESOURCES": '{"GPU": 2}',
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # as vLLM's own workers are
        "RAY_memory_monitor_refresh_ms": "0",  # other tests may use the machine's memory
        "PYTHONPATH": os.pathsep.join([str(RAY_ON_CPU), os.environ.get("PYTHONPATH", "")]),
    },
}
IS_ROOT = os.geteuid() == 0  # who alone may make the network namespaces of two hosts
SHARED_MEMORY = Path("/dev/shm")
ONE_RANK_A_HOST = {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'}


@pytest.fixture(autouse=True)
def shared_memory() -> Iterator[None]:
    """Ranks of vLLM on CPUs leave theirs behind, and one that draws the same port could not start."""
    before = set(SHARED_MEMORY.glob("*cpushm*"))
    yield
    for left in set(SHARED_MEMORY.glob("*cpushm*")) - before:
        left.unlink()


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    """SmolLM2's first layers, whose three KV heads two ranks cannot divide, with a silent fourth."""
    folder = tmp_path_factory.mktemp("models")
    return with_divisible_heads(first_layers(smollm2, folder / "short", LAYERS), folder / "even")


@pytest.fixture(scope="module")
def asked(prompts) -> list[list[int]]:
    return [prompts(900 + i, 60 + 137 * i % 1900) for i in range(20)]


@pytest.fixture(scope="module")
def alone(model, asked) -> list[Completion]:
    """What one process with all heads says."""
    with serving(model, settings=TOGETHER, extra_args=FP32) as client:
        return client.complete_all(asked, 12)


def two_ranks(
    model: Path, settings: dict, executor: str, env: dict[str, str] | None = None
) -> AbstractContextManager[Client]:
    # Room for all prompts at once, in less than half of the memory that the server would take.
    arguments = ("--num-gpu-blocks-override", "220", "--distributed-executor-backend", executor)
    arguments += ("--tensor-parallel-size", "2")
    env = RANKS[executor] if env is None else env
    return serving(model, settings=settings, extra_args=(*FP32, *arguments), env=env)


def counted(client: Client, kind: str, rank: str) -> float:
    """Rows of a kind that a rank has counted."""
    return client.metric("vllm:tokenselect_rows_total", kind=kind, tp_rank=rank)


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_ranks_that_vote_together_say_what_one_process_says(model, asked, alone, executor):
    with two_ranks(model, TOGETHER, executor) as client:
        said = client.complete_all(asked, 12)
        assert [c.tokens for c in said] == [c.tokens for c in alone]
        for kind in ("reselected", "reused", "dense"):
            wait_until(
                lambda kind=kind: 0 < counted(client, kind, "0") == counted(client, kind, "1")
            )
        assert len(start_logs(client.server.log())) == 1


def test_ranks_apart_answer_and_a_killed_one_ends_the_server(model, asked):
    with two_ranks(model, APART, "mp") as client:
        client.complete_all(asked[10:14], 12)
        wait_until(lambda: counted(client, "reused", "0") != counted(client, "reused", "1"))
        server = psutil.Process(client.server.pid)
        processes = server.children(recursive=True)
        second = next(p for p in processes if "VLLM::Worker_TP1" in "".join(p.cmdline()))
        second.kill()
        with pytest.raises(openai.APIError):
            client.complete(asked[0], 50)
        wait_until(lambda: not any(map(is_alive, (server, *processes))))


@pytest.mark.endurance
@pytest.mark.skipif(not IS_ROOT, reason="network namespaces are root's to make")
def test_ranks_on_two_hosts_answer_and_a_lost_host_ends_the_server(model, asked, alone):
    with two_hosts() as hosts, TemporaryDirectory(prefix="ray-") as folder:
        cluster = RayCluster(hosts, Path(folder), {**RANKS["ray"], **ONE_RANK_A_HOST})
        cluster.start()
        assert cluster.refuses_a_wrong_token()
        here, there = hosts
        # vLLM says at once that a worker died, and then waits so long for the answer of the others.
        patience = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "90"}
        host_env = {**cluster.env, **patience, "VLLM_HOST_IP": here.address}
        with here.entered(), two_ranks(model, TOGETHER, "ray", host_env) as client:
            longest = max(range(len(asked)), key=lambda i: len(asked[i]))
            assert client.complete(asked[longest], 12).tokens == alone[longest].tokens
            assert any(
                "RayWorkerProc" in "".join(psutil.Process(pid).cmdline())
                for pid in there.processes()
            )
            there.lose_power()
            with pytest.raises(openai.APIError):
                client.complete(asked[longest], 50)
            server = psutil.Process(client.server.pid)
            wait_until(lambda: not is_alive(server))
            assert "RayWorkerProc rank=[1] died unexpectedly" in client.server.log()
