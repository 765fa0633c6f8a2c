"""Requests to a server, many at a time, with what is needed to tell one answer from another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

# Two tokens whose log-probabilities differ by less may change places when the same sums are taken in
# another order, as batches of other sizes do.
ROUNDING = 2e-3


@dataclass(frozen=True)
class Prompt:
    """A prompt of tokens, with the extra arguments of its request."""

    tokens: tuple[int, ...]
    max_tokens: int
    xargs: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        """The completion request, greedy, with the runner-up of every token."""
        return {
            "model": model,
            "prompt": list(self.tokens),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
            "vllm_xargs": self.xargs or None,
        }


@dataclass(frozen=True)
class Answer:
    """Generated tokens, and by how much each was ahead of the next likely one."""

    tokens: tuple[int, ...]
    leads: tuple[float, ...]

    @classmethod
    def from_json(cls, answer: dict[str, Any]) -> Answer:
        logprobs = answer["choices"][0]["logprobs"]
        leads = []
        for chosen, likely in zip(
            logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            ranked = sorted(likely.values(), reverse=True)
            leads.append(chosen - ranked[1])
        tokens = (int(token.removeprefix("token_id:")) for token in logprobs["tokens"])
        return cls(tuple(tokens), tuple(leads))

    def difference(self, other: Answer) -> tuple[str, float] | None:
        """Where another answer parts from this one and by how much this one was sure there."""
        for index, (own, others) in enumerate(zip(self.tokens, other.tokens, strict=True)):
            if own != others:
                return f"token {index}: {own} or {others}", self.leads[index]
        return None


def random_length(rng: random.Random, least: int, most: int) -> int:
    """More short prompts than long ones, as servers see them."""
    return round(least * (most / least) ** (rng.random() ** 1.5))


async def complete(session: aiohttp.ClientSession, model: str, prompt: Prompt) -> Answer:
    """One completion.

    Raises:
        aiohttp.ClientResponseError: the server's HTTP error.
    """
    async with session.post("/v1/completions", json=prompt.body(model)) as response:
        response.raise_for_status()
        return Answer.from_json(await response.json())


async def complete_all(
    base_url: str, model: str, prompts: Iterable[Prompt], concurrent: int
) -> list[Answer]:
    """Completions of all prompts in order, so many of them at a time."""
    gate = asyncio.Semaphore(concurrent)

    async def one(prompt: Prompt) -> Answer:
        async with gate:
            return await complete(session, model, prompt)

    async with session_of(base_url) as session:
        return list(await asyncio.gather(*map(one, prompts)))


def session_of(base_url: str) -> aiohttp.ClientSession:
    """A session without limits of its own."""
    return aiohttp.ClientSession(
        base_url,
        timeout=aiohttp.ClientTimeout(total=None),
        # The server closes idle connections, perhaps just as they are used again.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )
