"""One server computes prompts, another one generates; files carry the KV cache between them.

vLLM's ExampleConnector writes a prompt's blocks to a shared folder.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, serving

pytestmark = [pytest.mark.server, pytest.mark.endurance]

# It writes and reads a whole prompt in one step.
WHOLE = ("--dtype", "float32", "--block-size", "128", "--no-enable-chunked-prefill")
SIZES = ("--max-model-len", "4096", "--max-num-batched-tokens", "4352", "--max-num-seqs", "4")
LENGTHS = (700, 1500, 2305, 3000)


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", 4)


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
