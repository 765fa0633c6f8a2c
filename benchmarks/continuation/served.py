"""Servers of the ways, and the continuations that they write or are made to write."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.continuation.ways import ServedWay
from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError
from vllm_tokenselect.tools.common.server import VllmServer

PROCESSOR = "benchmarks.continuation.forced:ForcedTokens"
FORCED = "forced_tokens"  # the extra argument of a request that the processor reads
LIKELY = 5  # most likely tokens that are told of each generated token
NUM_SEQS = 4
_TOKEN = "token_id:"


@dataclass(frozen=True)
class Continuation:
    """Generated tokens, and of each the log-probabilities of the most likely ones and its own."""

    tokens: list[int]
    likely: list[dict[int, float]]


@dataclass(frozen=True)
class Asked:
    """A text to continue.

    Attributes:
        forced: what is generated, whatever the model would say; None for its own most likely tokens.
    """

    number: int
    prompt: list[int]
    forced: list[int] | None = None


def start(model: Path, way: ServedWay, dtype: str, longest: int) -> VllmServer:
    """A server that attends in this way, for contexts of up to `longest` tokens."""
    root = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    return VllmServer(
        model,
        backend="CPU_ATTN" if way.settings is None else "TOKENSELECT",
        settings=way.settings,
        extra_args=[
            *("--dtype", dtype, "--max-model-len", str(longest), "--max-logprobs", str(LIKELY)),
            *("--max-num-seqs", str(NUM_SEQS), "--max-num-batched-tokens", "2048"),
            *("--skip-tokenizer-init", "--logits-processors", PROCESSOR),
        ],
        env={"PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root},
    )


async def continue_all(
    server: VllmServer,
    way: ServedWay,
    texts: Iterable[Asked],
    count: int,
    on_done: Callable[[Asked, Continuation], None],
) -> None:
    """Continue texts by `count` tokens each, four at a time; `on_done` has each as it comes."""
    endpoint = Endpoint(server.base_url, server.model)
    async with (
        Client(endpoint, concurrency=NUM_SEQS, timeout=3600.0, attempts=1) as client,
        asyncio.TaskGroup() as group,
    ):

        async def one(text: Asked) -> None:
            on_done(text, await _continue(client, way, text, count))

        for text in texts:
            group.create_task(one(text))


async def _continue(client: Client, way: ServedWay, text: Asked, count: int) -> Continuation:
    xargs: dict[str, Any] = dict(way.xargs)
    if text.forced is not None:
        xargs[FORCED] = text.forced
    body = {
        "prompt": text.prompt,
        "max_tokens": count,
        "ignore_eos": True,
        "logprobs": LIKELY,
        "return_tokens_as_token_ids": True,
        "vllm_xargs": xargs or None,
    }
    said = (await client.post("/v1/completions", body))["choices"][0]["logprobs"]
    tokens = [_number(token) for token in said["tokens"]]
    if text.forced not in (None, tokens):
        raise ServerError(
            f"the server of {way.name!r} did not generate the tokens that it was given"
        )
    likely = [{_number(token): lp for token, lp in each.items()} for each in said["top_logprobs"]]
    return Continuation(tokens, likely)


def _number(token: str) -> int:
    return int(token.removeprefix(_TOKEN))
