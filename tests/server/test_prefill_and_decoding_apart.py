"""One server computes prompts, another one generates; files carry the KV cache between them.

vLLM's ExampleConnector writes a prompt's blocks to a shared folder.
"""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, serving
from tests.server.test_client import wait_until

pytestmark = [pytest.mark.server, pytest.mark.endurance]

# It writes and reads a whole prompt in one step.
WHOLE = ("--dtype", "float32", "--block-size", "128", "--no-enable-chunked-prefill")
SIZES = ("--max-model-len", "4096", "--max-num-batched-tokens", "4352", "--max-num-seqs", "4")
LENGTHS = (700, 1500, 2305, 3000)
LAYERS = 4


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", LAYERS)


def start(
    model: Path, folder: Path | None, role: str = "kv_both", **settings: int
) -> AbstractContextManager[Client]:
    arguments = (*WHOLE, *SIZES)
    if folder is not None:
        transfer = {"kv_connector": "ExampleConnector", "kv_role": role}
        transfer["kv_connector_extra_config"] = {"shared_storage_path": str(folder)}
        arguments += ("--kv-transfer-config", json.dumps(transfer))
    return serving(model, settings=SPARSE | settings, extra_args=arguments, env=SMALL_WORKERS)


def loaded(client: Client) -> float:
    return client.metric("vllm:external_prefix_cache_hits_total")


def shared_tokens(length: int) -> int:
    """What is loaded of a prompt: below the limit of the shortest one that has the same files."""
    held = (length - 1) // 128 * 128
    return (held - SPARSE["tail_queries"]) // 256 * 256 if length % 128 != 1 else 0


def test_two_servers_answer_as_one(model, prompts, tmp_path):
    asked = [prompts(seed, length) for seed, length in enumerate(LENGTHS, 960)]
    with start(model, None) as client:
        expected = [client.complete(prompt, 12) for prompt in asked]
    with (
        start(model, tmp_path, "kv_producer") as prefill,
        start(model, tmp_path, "kv_consumer") as decode,
    ):
        for prompt, answer in zip(asked, expected, strict=True):
            prefill.complete(prompt, 1)
            before = loaded(decode)
            apart = decode.complete(prompt, 12)
            assert loaded(decode) - before == shared_tokens(len(prompt))
            assert apart.tokens == answer.tokens
            assert apart.logprobs == pytest.approx(answer.logprobs, abs=1e-3)
        # Nothing is loaded of what was computed by other settings, of a request or a server.
        before = loaded(decode)
        decode.complete(asked[1], 2, tokenselect_top_k=100)
        assert loaded(decode) == before
    with start(model, tmp_path, top_k=300) as other:
        other.complete(asked[2], 2)
        assert loaded(other) == 0
    # Files that are not whole are left alone, and the prompt is computed.
    damaged = list(tmp_path.rglob("*.safetensors"))
    for path in damaged[::2]:
        path.write_bytes(path.read_bytes()[:-1])
    with start(model, tmp_path) as client:
        again = [client.complete(prompt, 12) for prompt in asked]
    assert [answer.tokens for answer in again] == [answer.tokens for answer in expected]


def test_either_server_is_killed_in_mid_request_and_the_other_one_answers_as_before(
    model, prompts, tmp_path
):
    whole, half_written = prompts(970, 1500), prompts(971, 4000)
    with start(model, None) as client:
        expected = [client.complete(prompt, 12).tokens for prompt in (whole, half_written)]
    with ExitStack() as decoders, ExitStack() as prefills:
        decode = decoders.enter_context(start(model, tmp_path, "kv_consumer"))
        prefill = prefills.enter_context(start(model, tmp_path, "kv_producer"))
        prefill.complete(whole, 1)
        assert decode.complete(whole, 12).tokens == expected[0]

        kill_while_it_computes(prefill, half_written, tmp_path)
        assert is_healthy(decode)
        before = loaded(decode)
        assert decode.complete(half_written, 12).tokens == expected[1]
        assert decode.complete(whole, 12).tokens == expected[0]
        assert loaded(decode) == before, "a prompt of which some layers are missing is computed"

        prefill = prefills.enter_context(start(model, tmp_path, "kv_producer"))
        kill_while_it_generates(decode, whole)
        assert is_healthy(prefill)
        assert prefill.complete(half_written, 12).tokens == expected[1]

        decode = decoders.enter_context(start(model, tmp_path, "kv_consumer"))
        assert [decode.complete(each, 12).tokens for each in (whole, half_written)] == expected
        assert loaded(decode) == shared_tokens(len(whole))


def kill_while_it_computes(client: Client, prompt: list[int], folder: Path) -> None:
    """Kill all of a server's processes at once, when files of some layers of a prompt are there."""
    before = set(folder.rglob("*.safetensors"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.complete, prompt, 1)
        wait_until(lambda: set(folder.rglob("*.safetensors")) - before, pause=0.001)
        os.killpg(client.server.pid, signal.SIGKILL)
        with pytest.raises(openai.APIConnectionError):
            asked.result(timeout=60)
    assert 0 < len(set(folder.rglob("*.safetensors")) - before) < LAYERS


def kill_while_it_generates(client: Client, prompt: list[int]) -> None:
    """Kill all of a server's processes at once, when a part of an answer is there."""
    answer = client.openai.completions.create(
        model=client.model,
        prompt=prompt,
        max_tokens=2000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert next(answer).choices
    os.killpg(client.server.pid, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx.TransportError)):
        list(answer)


def is_healthy(client: Client) -> bool:
    with urllib.request.urlopen(f"{client.server.base_url}/health", timeout=30) as answer:
        return bool(answer.status == 200)
