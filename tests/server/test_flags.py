"""Options of `vllm serve` that users combine do with TOKENSELECT what they do without it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models.shortened import first_layers
from tests.server.conftest import FP32, Client, serving
from tests.server.open_paths import answered_without_a_key, operations

pytestmark = pytest.mark.server

LAYERS, RANK = 2, 8
COVERING = {"top_k": 4096}  # more than any prompt here has: full attention
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
CHOICES = ["north", "south"]
LMCACHE = json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"})


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", LAYERS)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """A LoRA adapter of keys and values, whose numbers are random and large enough to be noticed."""
    config = json.loads((model / "config.json").read_text())
    width = config["hidden_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(LAYERS):
        for name in ("k_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(RANK, width, generator=generator)
            weights[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(
                kv_width, RANK, generator=generator
            )
    folder = tmp_path_factory.mktemp("adapter")
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings |= {"target_modules": ["k_proj", "v_proj"], "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def ask(client: Client, prompt: list[int], model: str, **asked: object) -> str:
    answer = client.openai.completions.create(
        model=model, prompt=prompt, max_tokens=12, temperature=0, extra_body=asked
    )
    return answer.choices[0].text


def answers(client: Client, batch: list[list[int]], **asked: object) -> dict[str, list[str]]:
    """What is said plainly, through the adapter, and in the only words that are allowed."""
    return {
        "plain": [ask(client, prompt, client.model, **asked) for prompt in batch],
        "adapter": [ask(client, prompt, "adapter") for prompt in batch],
        "choice": [
            ask(client, prompt, client.model, structured_outputs={"choice": CHOICES})
            for prompt in batch
        ],
    }


KEY = {"VLLM_API_KEY": "none"}  # the clients' of these tests
GUARD = ("--middleware", "vllm_tokenselect.guard.ClientsOnly")
SECURITY = Path(__file__).parents[2] / "SECURITY.md"
OPEN_PATHS = {
    *("/invocations", "/generative_scoring", "/tokenize", "/detokenize"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
    *("/metrics", "/load", "/version", "/kv_event_sources", "/docs", "/redoc", "/openapi.json"),
    *("/health", "/ping"),
}
OPTIONS = (
    *("--no-enable-prefix-caching", "--speculative-config", json.dumps(NGRAM)),
    *("--scheduling-policy", "priority"),
)


@dataclass(frozen=True)
class Said:
    """What a server answers to three kinds of requests, and which paths it answers without a key."""

    answers: dict[str, list[str]]
    open_paths: set[str]


@pytest.fixture(scope="module")
def said(model, adapter, prompts) -> dict[str, Said]:
    """Of vLLM's own backend as it is, and of TOKENSELECT with all options at once."""
    batch = [prompts(700, 300), prompts(701, 1500)]
    lora = ("--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"adapter={adapter}")
    arguments = (*FP32, *lora)
    with serving(model, backend="CPU_ATTN", extra_args=arguments, env=KEY) as client:
        url = client.server.base_url
        asked = operations(url)
        plain = Said(answers(client, batch), answered_without_a_key(url, asked))
    arguments += (*OPTIONS, *GUARD)
    with serving(
        model, settings=COVERING, extra_args=arguments, enforce_eager=False, env=KEY
    ) as client:
        url = client.server.base_url
        # Without the policy, vLLM refuses a priority.
        combined = Said(answers(client, batch, priority=1), answered_without_a_key(url, asked))
    return {"plain": plain, "combined": combined}


def test_combined_options_change_nothing_that_is_said(said):
    """Compiled, no prefix caching, drafts, adapters, structured output and priorities, all at once."""
    expected = said["plain"].answers
    assert expected["adapter"] != expected["plain"]
    assert {*expected["choice"]} <= {*CHOICES}
    assert said["combined"].answers == expected


def test_vllms_key_guards_some_paths_and_the_documentation_names_the_others(said):
    assert said["plain"].open_paths == OPEN_PATHS
    assert {*re.findall(r"`(/\w+(?:\.json)?)`", SECURITY.read_text())} >= OPEN_PATHS


def test_the_guard_closes_all_but_what_probes_and_prometheus_ask(said):
    assert said["combined"].open_paths == {"/health", "/metrics"}


@pytest.mark.endurance
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--kv-cache-dtype", "fp8", "fp8"),
        ("--kv-offloading-size", "1", '"spec_name": "CpuOffloadingSpec"'),
        ("--kv-transfer-config", LMCACHE, "does not serve the KV connector LMCacheConnectorV1"),
        ("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler", "cannot be used"),
    ],
)
def test_what_is_not_served_on_a_cpu_stops_the_server_by_name(refusal, option, value, said):
    log = refusal({}, option, value)
    assert "TOKENSELECT" in log
    assert said in log
