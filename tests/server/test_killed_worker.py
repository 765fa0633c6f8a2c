"""A worker that is killed takes the server with it, as with any backend: nothing hangs, nothing is left."""

from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from tests.server.conftest import FP32, SPARSE, serving
from tests.server.test_client import wait_until

pytestmark = [
    pytest.mark.server,
    pytest.mark.endurance,
]  # `test_tensor_parallel` kills one every time


def test_a_killed_worker_ends_its_request_and_the_server(smollm2, prompts):
    with serving(smollm2, settings=SPARSE, extra_args=FP32) as client:
        server = psutil.Process(client.server.pid)
        processes = server.children(recursive=True)
        worker = next(p for p in processes if "VLLM::Worker" in "".join(p.cmdline()))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.complete, prompts(301, 6000), 50)
            wait_until(lambda: client.metric("vllm:num_requests_running") == 1)
            worker.kill()
            with pytest.raises(openai.APIError):
                asked.result(timeout=60)
        wait_until(lambda: not any(map(is_alive, (server, *processes))))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
