"""Prompts come back from LMCache's server as they were computed, and only to whom they belong.

Runs where LMCache is installed: `make lmcache-check`.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache is not installed (make lmcache-check)")

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, Completion, serving
from tests.server.test_client import wait_until
from tests.server.test_offloading import LAYERS, loads, same, since
from vllm_tokenselect.tools.common.server import free_port

pytestmark = [pytest.mark.server, pytest.mark.endurance]

# A cache of three prompts.
SIZES = (
    *("--dtype", "float32", "--block-size", "128", "--max-model-len", "2048"),
    *("--max-num-batched-tokens", "1024", "--max-num-seqs", "4", "--num-gpu-blocks-override", "40"),
)
# Six of LMCache's chunks fit into a prompt of 1,550 tokens, and others share five of them.
LENGTH, SHARED = 1550, 1280
CHUNK = 256


@contextmanager
def running_lmcache(log: Path, folder: Path | None = None) -> Iterator[tuple[int, Callable]]:
    """LMCache's server, which may keep files: its port, and a function that kills it."""
    port = free_port()
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--chunk-size", str(CHUNK), "--l1-size-gb", "1"]
    command += ["--no-l1-use-lazy", "--eviction-policy", "LRU"]
    command += ["--supported-transfer-mode", "engine_driven", "--disable-metrics"]
    if folder is not None:
        files = {"type": "fs", "base_path": str(folder)}
        command += ["--l2-adapter", json.dumps(files)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def kill() -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    try:
        wait_until(lambda: process.poll() is not None or is_open(port))
        assert process.poll() is None, log.read_text()
        yield port, kill
    finally:
        kill()


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def start(model: Path, port: int | None, **settings: int) -> AbstractContextManager[Client]:
    arguments = SIZES
    if port is not None:
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra | {"lmcache.mp.heartbeat_interval": 1},
        }
        arguments += ("--kv-transfer-config", json.dumps(transfer))
    return serving(model, settings=SPARSE | settings, extra_args=arguments, env=SMALL_WORKERS)


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", LAYERS)


@pytest.fixture(scope="module")
def asked(prompts) -> list[list[int]]:
    return [prompts(seed, LENGTH) for seed in range(1100, 1106)]


@pytest.fixture(scope="module")
def related(asked, prompts) -> dict[str, tuple[list[int], int]]:
    """Prompts that begin as others do, and how many of their tokens are shared."""
    return {
        "parts within a query chunk": ([*asked[0][:700], *prompts(1110, 800)], 512),
        "ends earlier": (asked[1][:1300], 1024),
        "goes on": ([*asked[2], *prompts(1111, 300)], SHARED),
        "is shorter than a chunk": (asked[3][:200], 0),
    }


@pytest.fixture(scope="module")
def computed(model, asked, related) -> dict[str, list[Completion]]:
    """What a server answers that has no connector."""
    with start(model, None) as client:
        return {
            "asked": answers(client, asked),
            "related": answers(client, [prompt for prompt, _ in related.values()]),
            "of top_k 100": [client.complete(prompt, 6, tokenselect_top_k=100) for prompt in asked],
        }


def answers(client: Client, prompts: list[list[int]]) -> list[Completion]:
    return [client.complete(prompt, 6) for prompt in prompts]


def test_prompts_come_back_as_they_were_computed(model, asked, related, computed, tmp_path):
    with running_lmcache(tmp_path / "log") as (port, _), start(model, port) as client:
        same(answers(client, asked), computed["asked"])
        assert loads(client)["cache"] == loads(client)["connector"] == 0
        same(answers(client, asked), computed["asked"])
        assert loads(client)["connector"] == 6 * SHARED
        for (prompt, shared), expected in zip(related.values(), computed["related"], strict=True):
            before = loads(client)
            same([client.complete(prompt, 6)], [expected])
            found = since(client, before)
            assert (found["cache"], found["connector"]) == (0, shared)
        before = loads(client)
        same(client.complete_all(asked[:4], 6), computed["asked"][:4])
        found = since(client, before)
        assert found["cache"] + found["connector"] == 4 * SHARED, (
            "where one ends, the other goes on"
        )
        assert found["connector"] > 2 * SHARED

        # A request of other settings finds nothing, and the second time what it has computed itself.
        for shared in (0, 6 * SHARED):
            before = loads(client)
            ours = [client.complete(prompt, 6, tokenselect_top_k=100) for prompt in asked]
            same(ours, computed["of top_k 100"])
            assert since(client, before)["connector"] == shared


def test_servers_of_the_same_settings_share_and_others_find_nothing(
    model, asked, computed, tmp_path
):
    found = []
    with running_lmcache(tmp_path / "log") as (port, _):
        for top_k in (368, 100, 368):
            with start(model, port, top_k=top_k) as client:
                expected = computed["asked" if top_k == 368 else "of top_k 100"]
                same(answers(client, asked), expected)
                found.append(loads(client)["connector"])
    assert found == [0, 0, 6 * SHARED]


def test_files_of_lmcache_outlive_both_servers(model, asked, computed, tmp_path):
    found = []
    for _ in range(2):
        with (
            running_lmcache(tmp_path / "log", tmp_path / "files") as (port, _kill),
            start(model, port) as client,
        ):
            same(answers(client, asked), computed["asked"])
            found.append(loads(client)["connector"])
    assert found == [0, 6 * SHARED]


def test_without_lmcaches_server_prompts_are_computed(model, asked, computed, tmp_path):
    with running_lmcache(tmp_path / "log") as (port, kill), start(model, port) as client:
        same(answers(client, asked[:3]), computed["asked"][:3])
        same(answers(client, asked[3:]), computed["asked"][3:])
        kill()
        same(client.complete_all(asked[:4], 6), computed["asked"][:4])
        same(answers(client, asked), computed["asked"])
        assert loads(client)["connector"] == 0
