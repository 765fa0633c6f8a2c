"""MultiConnector: a prompt's beginning comes from host memory, or from files where that has none of it."""

from __future__ import annotations

import json

import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, Completion, serving
from tests.server.test_offloading import BLOCK_BYTES, LAYERS, LENGTH, SHARED, loads, same, since

pytestmark = [pytest.mark.server, pytest.mark.endurance]

# What ExampleConnector needs, and a cache of three prompts.
ARGUMENTS = (
    *("--dtype", "float32", "--block-size", "128", "--no-enable-chunked-prefill"),
    *("--max-model-len", "2048", "--max-num-batched-tokens", "2304", "--max-num-seqs", "4"),
    *("--num-gpu-blocks-override", "40"),
)


def test_prompts_come_from_the_first_connector_that_has_them(
    smollm2, prompts, tmp_path, tmp_path_factory
):
    model = first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", LAYERS)
    host = {
        "spec_name": "CpuOffloadingSpec",
        "spec_module_path": "vllm_tokenselect.backend.cpu_offloading",
        "cpu_bytes_to_use": 100 * BLOCK_BYTES,
    }
    files = {"shared_storage_path": str(tmp_path)}
    several = {"OffloadingConnector": host, "ExampleConnector": files}
    connectors = [
        {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
        for name, extra in several.items()
    ]
    transfer = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    transfer["kv_connector_extra_config"] = {"connectors": connectors}
    arguments = (*ARGUMENTS, "--kv-transfer-config", json.dumps(transfer))
    options = {"settings": SPARSE, "extra_args": arguments, "env": SMALL_WORKERS}
    asked = [prompts(seed, LENGTH) for seed in range(1000, 1006)]

    def answers(client: Client) -> list[Completion]:
        return [client.complete(prompt, 6) for prompt in asked]

    with serving(model, **options) as client:
        computed = answers(client)
        before = loads(client)
        assert before["cache"] == before["connector"] == 0
        same(answers(client), computed)
        found = since(client, before)
        assert found["cache"] == 0
        assert found["connector"] == 6 * SHARED
        assert found["host"] == 6 * SHARED // 128 * BLOCK_BYTES, "host memory is asked first"
    with serving(model, **options) as client:
        same(answers(client), computed)
        assert loads(client)["connector"] == 6 * SHARED
        assert loads(client)["host"] == 0, "a new server's is empty: all came from files"
