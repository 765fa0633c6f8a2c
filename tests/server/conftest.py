"""Servers for the tests: fp32, eager, small KV caches; one at a time, shared by what needs the same."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import openai
import pytest

from tests.oracle.cases import SETTINGS
from tests.prometheus import metric
from vllm_tokenselect.tools.common.server import ServerFailed, VllmServer

SPARSE = asdict(SETTINGS)
BLOCK_SIZE = 128  # vLLM's default on CPUs
FP32 = ("--dtype", "float32", "--max-num-batched-tokens", "1024", "--max-num-seqs", "16")
# One thread and one GiB of KV cache for each of the server's workers, wherever this process may run.
SMALL_WORKERS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True)
class Completion:
    """Generated tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


class Client:
    """What the tests ask of a running server."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server
        self.model = server.model
        # The server closes idle connections after five seconds, perhaps just as they are used again.
        self.openai = openai.OpenAI(
            base_url=f"{server.base_url}/v1",
            api_key="none",
            timeout=600,
            max_retries=0,
            default_headers={"Connection": "close"},
        )

    def complete(self, prompt: list[int], max_tokens: int, **xargs: object) -> Completion:
        """Greedy completion of a prompt of tokens, with the request's own settings."""
        choice = self.openai.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            logprobs=1,
            extra_body={
                "ignore_eos": True,
                "return_tokens_as_token_ids": True,
                "vllm_xargs": xargs or None,
            },
        ).choices[0]
        tokens = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
        return Completion(tokens, list(choice.logprobs.token_logprobs))

    def complete_all(self, prompts: list[list[int]], max_tokens: int) -> list[Completion]:
        """Greedy completions of prompts that are sent all at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, max_tokens), prompts))

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a counter's samples that have these labels, from `/metrics`."""
        with urllib.request.urlopen(f"{self.server.base_url}/metrics", timeout=30) as answer:
            return metric(answer.read().decode(), name, **labels)


@contextmanager
def serving(model: Path, **options: object) -> Iterator[Client]:
    """A client of a server that runs while the block does."""
    with VllmServer(model, **options) as server:
        yield Client(server)


@pytest.fixture(scope="session")
def sparse_client(smollm2) -> Iterator[Client]:
    """A server that selects 368 tokens."""
    with serving(smollm2, settings=SPARSE, extra_args=FP32) as client:
        yield client


@pytest.fixture(scope="session")
def prompts(tokenizer) -> Callable[..., list[int]]:
    """Make a prompt of a length in tokens from a seed."""
    from tests.oracle.prompts import prompt_tokens

    return lambda seed, length, shared=None: prompt_tokens(tokenizer, seed, length, shared)


@pytest.fixture(scope="session")
def layers(smollm2) -> int:
    """Layers of the model, which all select."""
    return json.loads((smollm2 / "config.json").read_text())["num_hidden_layers"]


@pytest.fixture
def refusal(smollm2, tmp_path) -> Callable[..., str]:
    """Start a server with settings that it must refuse; returns its log."""

    def start(settings: dict, *extra_args: str) -> str:
        log_path = tmp_path / "refused.log"
        server = VllmServer(smollm2, settings=settings, extra_args=extra_args, log_path=log_path)
        with pytest.raises(ServerFailed):
            server.start()
        return server.log()

    return start
