"""A prompt's beginning comes back from host memory and from files as it comes from the prefix cache.

vLLM copies offloaded blocks from and to GPUs only. Here they are copied by `CpuOffloadingSpec`; the
connector, what it keeps and looks up, the files and the counters are vLLM's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.models.heads import echo_tokens, save_eagle
from tests.models.shortened import first_layers
from tests.models.zoo import save
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, Completion, serving
from tests.server.test_drafts import SMALL, same

pytestmark = pytest.mark.server

LAYERS = 4
FP32 = ("--dtype", "float32", "--max-num-batched-tokens", "1024", "--max-num-seqs", "4")
# Of a prompt of 1,500 tokens others share 1,280.
LENGTH, SHARED = 1500, 1280
BLOCK_BYTES = LAYERS * 128 * 2 * 3 * 64 * 4


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", LAYERS)


def offloading(folder: Path, host_blocks: int, blocks: int) -> tuple[str, ...]:
    """A cache of so many blocks, so many in host memory, and files for what finds no room there."""
    extra = {
        "spec_name": "CpuOffloadingSpec",
        "spec_module_path": "vllm_tokenselect.backend.cpu_offloading",
        "cpu_bytes_to_use": host_blocks * BLOCK_BYTES,
        "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
    }
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
        "kv_load_failure_policy": "recompute",
    }
    sizes = ("--max-model-len", "2048", "--num-gpu-blocks-override", str(blocks))
    return (*FP32, *sizes, "--kv-transfer-config", json.dumps(transfer))


def loads(client: Client) -> dict[str, float]:
    """What vLLM has counted so far: tokens by where they came from, and bytes that were read from files."""

    def counted(name: str, **labels: str) -> float:
        try:
            return client.metric(name, **labels)
        except LookupError:
            return 0.0

    return {
        "cache": counted("vllm:prefix_cache_hits_total"),
        "connector": counted("vllm:external_prefix_cache_hits_total"),
        "host": counted("vllm:kv_offload_load_bytes_total"),
        "files": counted("vllm:kv_offload_tiering_read_bytes_total", tier="1:fs"),
    }


def since(client: Client, before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in loads(client).items()}


def test_an_answer_is_the_same_from_the_cache_from_host_memory_and_from_files(
    model, prompts, tmp_path
):
    """The cache holds three prompts, host memory two, and files all six."""
    asked = [prompts(seed, LENGTH) for seed in range(900, 906)]

    def answers(client: Client, batch: list[list[int]]) -> list[Completion]:
        return [client.complete(prompt, 6) for prompt in batch]

    with serving(
        model, settings=SPARSE, extra_args=offloading(tmp_path, 20, 40), env=SMALL_WORKERS
    ) as client:
        computed = answers(client, asked)
        assert loads(client)["cache"] == loads(client)["connector"] == 0
        before = loads(client)
        same(answers(client, asked[-1:]), computed[-1:])
        assert since(client, before) == {"cache": SHARED, "connector": 0, "host": 0, "files": 0}
        before = loads(client)
        same(answers(client, asked[:3]), computed[:3])
        found = since(client, before)
        assert found["cache"] == 0
        assert found["connector"] == 3 * SHARED
        assert found["files"] == 3 * SHARED // 128 * BLOCK_BYTES
        same(answers(client, asked[3:]), computed[3:])
        before = loads(client)
        same(answers(client, asked[2:3]), computed[2:3])
        found = since(client, before)
        assert found["cache"] + found["connector"] == SHARED, "one may go on where the other ends"
        # Another budget is another name: nothing is found.
        before = loads(client)
        client.complete(asked[0], 2, tokenselect_top_k=100)
        assert since(client, before) == {"cache": 0, "connector": 0, "host": 0, "files": 0}


@pytest.mark.endurance
def test_another_server_finds_the_files_and_computes_what_is_lost(model, prompts, tmp_path):
    asked = [prompts(seed, LENGTH) for seed in range(910, 914)]
    answers = []
    for lost in (0, 1, 2):
        files = sorted(tmp_path.rglob("*.bin"))
        for file in files[:: 3 * lost] if lost else ():
            file.unlink() if lost == 1 else file.write_bytes(b"")
        with serving(
            model, settings=SPARSE, extra_args=offloading(tmp_path, 20, 40), env=SMALL_WORKERS
        ) as client:
            answers.append([client.complete(prompt, 6) for prompt in asked])
            found = loads(client)["connector"]
            assert (found > 0) == (lost > 0)
            assert found < len(asked) * SHARED
    same(answers[1], answers[0])
    same(answers[2], answers[0])


@pytest.mark.endurance
def test_a_hundred_prompts_come_back_from_the_offload(model, prompts, tmp_path):
    asked = [prompts(seed, LENGTH) for seed in range(100)]
    host_blocks = 100 * LENGTH // 128 + 8
    with serving(
        model, settings=SPARSE, extra_args=offloading(tmp_path, host_blocks, 60), env=SMALL_WORKERS
    ) as client:
        first = [client.complete(prompt, 6) for prompt in asked]
        before = loads(client)
        same([client.complete(prompt, 6) for prompt in asked], first)
        found = since(client, before)
        assert found["cache"] == 0
        assert found["connector"] == 100 * SHARED
        assert found["host"] == 100 * SHARED // 128 * BLOCK_BYTES
        before = loads(client)
        together = [
            answer for n in range(0, 100, 4) for answer in client.complete_all(asked[n : n + 4], 6)
        ]
        same(together, first)
        assert since(client, before)["connector"] == 100 * SHARED


@pytest.mark.endurance
def test_servers_of_other_settings_find_none_of_each_others_files(model, prompts, tmp_path):
    prompt = prompts(950, LENGTH)
    found: Callable[[Client], float] = lambda client: loads(client)["connector"]  # noqa: E731
    counted = []
    for top_k in (368, 300, 368):
        settings = {**SPARSE, "top_k": top_k}
        arguments = offloading(tmp_path, 20, 40)
        with serving(model, settings=settings, extra_args=arguments, env=SMALL_WORKERS) as client:
            client.complete(prompt, 2)
            counted.append(found(client))
    assert counted == [0, 0, SHARED]


@pytest.mark.endurance
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_beside_drafts_an_answer_is_the_same_from_host_memory(method, tmp_path):
    """Host memory keeps the keys of what drafts too; the cache holds three prompts."""
    model = echo_tokens(save(tmp_path / "target", "Llama", SMALL))
    make = partial(first_layers, count=2) if method == "draft_model" else save_eagle
    drafter = make(model, tmp_path / "drafter")
    asked = [random.Random(seed).choices(range(3, 512), k=LENGTH) for seed in range(6)]
    small = (*FP32, "--skip-tokenizer-init")
    with serving(model, settings=SPARSE, extra_args=small, env=SMALL_WORKERS) as client:
        expected = [client.complete(prompt, 24) for prompt in asked]
    drafts = {"method": method, "model": str(drafter), "num_speculative_tokens": 3}
    arguments = (
        *offloading(tmp_path / "files", 200, 40),
        *("--skip-tokenizer-init", "--speculative-config", json.dumps(drafts)),
    )
    with serving(model, settings=SPARSE, extra_args=arguments, env=SMALL_WORKERS) as client:
        same([client.complete(prompt, 24) for prompt in asked], expected)
        before = loads(client)
        accepted = client.metric("vllm:spec_decode_num_accepted_tokens_total")
        same([client.complete(prompt, 24) for prompt in asked], expected)
        found = since(client, before)
        assert found["cache"] == 0
        assert found["connector"] == 6 * SHARED
        assert client.metric("vllm:spec_decode_num_accepted_tokens_total") == 2 * accepted > 0
