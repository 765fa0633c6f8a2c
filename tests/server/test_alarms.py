"""A real Prometheus watches a real server: every query has data, and each alarm fires when it should.

A minute of the rules is a second here, see `prometheus_process.faster`. `pytest -s` shows what was seen.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict

import openai
import psutil
import pytest

from tests.metrics.alarms import ALARMS, selectors
from tests.metrics.dashboard import EXPRESSIONS
from tests.metrics.prometheus_process import Prometheus, configure
from tests.oracle.cases import CACHED_SETTINGS
from tests.server.conftest import FP32, SPARSE, Client
from tests.server.test_killed_worker import is_alive
from vllm_tokenselect.tools.common.server import VllmServer, free_port

pytestmark = [pytest.mark.server, pytest.mark.endurance]

LONG = 5200  # tokens: more than the alarm takes for a long prompt
TIGHT = (  # 24 blocks of 32 tokens for sixteen requests of up to 120
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "1024"),
    *("--max-num-seqs", "16", "--block-size", "32", "--num-gpu-blocks-override", "24"),
)


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {"roomy": free_port(), "tight": free_port()}


@pytest.fixture(scope="module")
def prometheus(ports, tmp_path_factory) -> Iterator[Prometheus]:
    configuration = configure(tmp_path_factory.mktemp("prometheus"), list(ports.values()))
    with Prometheus(configuration) as started:
        yield started


@pytest.fixture(scope="module")
def counters(tmp_path_factory):
    """Folder through which the roomy server's workers report."""
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def roomy(smollm2, ports, counters) -> Iterator[Client]:
    """A server with room for all that is asked of it, and a Selection Cache that often answers."""
    env = {"TOKENSELECT_METRICS_DIR": str(counters), "VLLM_CPU_KVCACHE_SPACE": "1"}
    options = {"settings": asdict(CACHED_SETTINGS), "extra_args": FP32, "env": env}
    server = VllmServer(smollm2, **options, port=ports["roomy"])
    with server:
        yield Client(server)


@contextmanager
def asking(ask: Callable[[], object]) -> Iterator[None]:
    """Ask again and again, one request at a time, while the block runs."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            ask()

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(run)
        try:
            yield
        finally:
            ended.set()
            asked.result(timeout=120)


def wait_until_fires(prometheus: Prometheus, alarm: str, client: Client, seconds: float) -> None:
    port = client.server.port
    prometheus.wait_for(lambda: alarm in prometheus.firing(port), seconds)
    print(f"\n{alarm} fires at {prometheus.firing(port)[alarm]:.3g}")


def shown(expression: str) -> str:
    """A query as Grafana sends it with nothing chosen."""
    for name in ("namespace", "pod", "instance", "model_name"):
        expression = expression.replace(f"${name}", ".*")
    return expression.replace("$__rate_interval", "20s")


def test_a_kv_cache_that_is_too_small_for_what_comes(prometheus, smollm2, ports):
    server = VllmServer(smollm2, settings=SPARSE, extra_args=TIGHT, port=ports["tight"])
    ended = threading.Event()
    with server, ThreadPoolExecutor(400) as pool:
        client = Client(server)

        def ask(seed: int) -> None:
            with suppress(openai.APIError):  # at the end
                client.complete([seed] * 20, 100)

        def come() -> None:
            """More than are served. All are short: vLLM counts a preemption when it has run again."""
            for seed in range(1000, 1400):
                pool.submit(ask, seed)
                if ended.wait(0.25):
                    break

        coming = threading.Thread(target=come)
        coming.start()
        try:
            for alarm in ("QueueGrows", "KVCacheNearlyFull", "RequestsArePreempted"):
                wait_until_fires(prometheus, alarm, client, 150)
        finally:
            ended.set()
            coming.join()
            server.stop()


def test_on_a_server_that_does_well_every_query_has_data_and_no_alarm_fires(
    prometheus, roomy, prompts
):
    long, short = prompts(911, LONG), prompts(912, 200)

    def ask():
        roomy.complete(long, 8)
        roomy.complete(short, 8)

    with asking(ask):
        queries = [*map(shown, EXPRESSIONS)]
        queries += [s for rule in ALARMS.values() for s in selectors(rule["expr"])]
        time.sleep(45)
        for query in dict.fromkeys(queries):
            values = [float(series["value"][1]) for series in prometheus.query(query)]
            print(f"\n{query}\n    {', '.join(f'{value:.3g}' for value in values)}")
            assert any(map(math.isfinite, values)), query
        assert not prometheus.firing(roomy.server.port)


def test_long_prompts_that_are_not_to_be_selected_from(prometheus, roomy, prompts):
    long = prompts(911, LONG)
    with asking(lambda: roomy.complete(long, 8, tokenselect="off")):
        wait_until_fires(prometheus, "TokenSelectSelectsNothing", roomy, 90)
        wait_until_fires(prometheus, "TokenSelectAttendsToEverything", roomy, 300)
        firing = set(prometheus.firing(roomy.server.port))
    assert firing == {"TokenSelectSelectsNothing", "TokenSelectAttendsToEverything"}


def test_a_request_that_ends_with_an_error(prometheus, roomy, prompts):
    """No token is both allowed and of the grammar."""
    with suppress(openai.APIError):
        roomy.openai.completions.create(
            model=roomy.model,
            prompt=prompts(913, 100),
            max_tokens=4,
            extra_body={"structured_outputs": {"choice": ["Yes"]}, "allowed_token_ids": [1000]},
        )
    wait_until_fires(prometheus, "RequestsEndWithErrors", roomy, 10)


def test_counters_that_are_lost(prometheus, roomy, prompts, counters):
    shutil.rmtree(counters)
    with asking(lambda: roomy.complete(prompts(914, 200), 4)):
        wait_until_fires(prometheus, "TokenSelectDoesNotCount", roomy, 60)


def test_a_worker_that_is_killed_and_a_server_that_is_started_again(prometheus, roomy, prompts):
    roomy.complete(prompts(915, 200), 1)
    instance = f"127.0.0.1:{roomy.server.port}"
    counted = f'vllm:prompt_tokens_total{{instance="{instance}"}} > 0'
    prometheus.wait_for(lambda: prometheus.query(counted), 10)
    processes = psutil.Process(roomy.server.pid).children(recursive=True)
    worker = next(p for p in processes if "VLLM::Worker" in "".join(p.cmdline()))
    worker.kill()
    prometheus.wait_for(lambda: not any(map(is_alive, processes)), 60)
    roomy.server.stop()
    roomy.server.start()
    wait_until_fires(prometheus, "ServerRestarted", roomy, 30)
