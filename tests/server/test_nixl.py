"""One server computes prompts, another one reads them from its memory through NIXL and generates."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS, SPARSE, Client, Completion, serving
from tests.server.nixl import downloaded
from tests.server.test_client import wait_until
from tests.server.test_offloading import BLOCK_BYTES
from tests.server.test_prefill_and_decoding_apart import (
    LAYERS,
    is_healthy,
    kill_while_it_generates,
    loaded,
)
from vllm_tokenselect.tools.common.server import free_port

pytestmark = [pytest.mark.server, pytest.mark.endurance]

ARGUMENTS = (
    *("--dtype", "float32", "--block-size", "128", "--max-model-len", "4096"),
    *("--max-num-batched-tokens", "1024", "--max-num-seqs", "4"),
)
LENGTHS = (60, 700, 1500, 2305, 3000)
FEW = {"tokenselect_top_k": 100}
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "CpuOffloadingSpec",
        "spec_module_path": "vllm_tokenselect.backend.cpu_offloading",
        "cpu_bytes_to_use": 100 * BLOCK_BYTES,
    },
}


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    return first_layers(smollm2, tmp_path_factory.mktemp("models") / "shortened", LAYERS)


@pytest.fixture(scope="module")
def start(model) -> Callable[..., AbstractContextManager[Client]]:
    """Start a server that computes for others, or reads what others computed."""
    folder = downloaded()

    def start(
        role: str, policy: str = "recompute", beside: tuple[dict[str, Any], ...] = ()
    ) -> AbstractContextManager[Client]:
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_role": role,
            # So only a reader's word frees a prompt's blocks.
            "kv_connector_extra_config": {"kv_lease_duration": 3600},
        }
        if beside:
            several = {"connectors": [transfer, *beside]}
            transfer = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
            transfer["kv_connector_extra_config"] = several
        transfer["kv_load_failure_policy"] = policy
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        own = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "PYTHONPATH": path}
        return serving(
            model,
            settings=SPARSE,
            extra_args=(*ARGUMENTS, "--kv-transfer-config", json.dumps(transfer)),
            env=SMALL_WORKERS | own,
        )

    return start


@dataclass(frozen=True)
class Asked:
    """Prompts, and what one server by itself answers to each."""

    prompts: list[list[int]]
    answers: list[Completion]
    answer_of_few: Completion


@pytest.fixture(scope="module")
def asked(model, prompts) -> Iterator[Asked]:
    each = [prompts(seed, length) for seed, length in enumerate(LENGTHS, 1100)]
    options = {"settings": SPARSE, "extra_args": ARGUMENTS, "env": SMALL_WORKERS}
    with serving(model, **options) as client:
        answers = [client.complete(prompt, 12) for prompt in each]
        return Asked(each, answers, client.complete(each[2], 12, **FEW))


def offer(client: Client, prompt: list[int], **xargs: object) -> dict[str, Any]:
    """Have a server compute a prompt; returns what it tells a reader."""
    wanted = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = client.openai.completions.create(
        model=client.model,
        prompt=prompt,
        max_tokens=1,
        temperature=0,
        extra_body={"kv_transfer_params": wanted, "vllm_xargs": xargs or None},
    )
    return dict(answer.kv_transfer_params)


def read(client: Client, prompt: list[int], offered: dict[str, Any], **xargs: object) -> list[int]:
    """Have a server answer a prompt that another one computed; returns the tokens."""
    answer = client.openai.completions.create(
        model=client.model,
        prompt=prompt,
        max_tokens=12,
        temperature=0,
        logprobs=1,
        extra_body={
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
            "kv_transfer_params": offered,
            "vllm_xargs": xargs or None,
        },
    )
    tokens = answer.choices[0].logprobs.tokens
    return [int(token.removeprefix("token_id:")) for token in tokens]


def shared_tokens(length: int) -> int:
    return max(length - SPARSE["tail_queries"], 0) // 256 * 256


def keeps_blocks(client: Client) -> bool:
    # A step is needed to see them freed.
    client.complete([1, 2, 3], 1)
    return client.metric("vllm:kv_cache_usage_perc") > 0


def test_two_servers_answer_as_one(start, asked):
    with ExitStack() as stack:
        prefill = stack.enter_context(start("kv_producer"))
        decode = stack.enter_context(start("kv_consumer"))
        for prompt, answer in zip(asked.prompts, asked.answers, strict=True):
            offered = offer(prefill, prompt)
            assert keeps_blocks(prefill)
            before = loaded(decode)
            assert read(decode, prompt, offered) == answer.tokens
            assert loaded(decode) - before == shared_tokens(len(prompt))
            wait_until(lambda: not keeps_blocks(prefill))

        # Other settings are refused by name, and the other server is told to free its blocks.
        prompt = asked.prompts[2]
        offered = offer(prefill, prompt)
        before = loaded(decode)
        with pytest.raises(openai.BadRequestError, match=r"top_k=368,.* this request has .*=100,"):
            read(decode, prompt, offered, **FEW)
        wait_until(lambda: not keeps_blocks(prefill))
        assert loaded(decode) == before
        # Equal ones are not.
        offered = offer(prefill, prompt, **FEW)
        assert read(decode, prompt, offered, **FEW) == asked.answer_of_few.tokens
        assert loaded(decode) - before == shared_tokens(len(prompt))

        # Another prompt than what is offered is computed.
        offered = offer(prefill, asked.prompts[3])
        before = loaded(decode)
        other = asked.prompts[4]
        assert read(decode, other, offered) == asked.answers[4].tokens
        assert loaded(decode) == before
        wait_until(lambda: not keeps_blocks(prefill))

        kill_while_it_generates(decode, asked.prompts[1])
        assert is_healthy(prefill)
        assert prefill.complete(asked.prompts[1], 12).tokens == asked.answers[1].tokens


def test_a_prompt_whose_server_died_is_computed_or_ends_with_an_error(start, asked):
    with start("kv_consumer", beside=(OFFLOADING,)) as decode:
        with start("kv_producer", beside=(OFFLOADING,)) as prefill:
            offers = [offer(prefill, prompt) for prompt in asked.prompts]
            assert read(decode, asked.prompts[4], offers[4]) == asked.answers[4].tokens
            assert loaded(decode) == shared_tokens(len(asked.prompts[4]))
            os.killpg(prefill.server.pid, signal.SIGKILL)
        for index in (2, 3):
            assert read(decode, asked.prompts[index], offers[index]) == asked.answers[index].tokens
        assert decode.metric("vllm:nixl_num_failed_transfers_total") == 2
    with start("kv_consumer", policy="fail") as decode:
        # This one never saw that server, and finds nobody.
        with pytest.raises(openai.InternalServerError):
            read(decode, asked.prompts[2], offers[2])
        assert is_healthy(decode)
        assert decode.complete(asked.prompts[2], 12).tokens == asked.answers[2].tokens
