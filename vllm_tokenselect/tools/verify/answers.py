"""A short greedy answer, token by token, and where two of them part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_tokenselect.tools.common.client import Client

# Nats between the two likeliest tokens, below which another order of additions may choose the other one.
NEAR = 0.1


@dataclass
class ShortAnswer:
    """An answer.

    Attributes:
        prompt_tokens: of the prompt.
        tokens: that were generated, as vLLM names them.
        logprobs: of these.
        margins: by how much each was likelier than the next likely one, nats; infinite where none is told.
    """

    prompt_tokens: int = 0
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def add(self, said: Mapping[str, Any]) -> None:
        self.tokens += said["tokens"]
        self.logprobs += said["token_logprobs"]
        for likely in said["top_logprobs"]:
            first, *others = sorted((likely or {}).values(), reverse=True) or [0.0]
            self.margins.append(first - others[0] if others else float("inf"))


async def ask_short(client: Client, prompt: str, max_tokens: int) -> ShortAnswer:
    """Ask for a greedy answer.

    Raises:
        ServerError: when the server refuses it, or breaks off.
    """
    answer = ShortAnswer()
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
    }
    async for event in client.stream("/v1/completions", body):
        for choice in event.get("choices", ()):
            if choice.get("logprobs"):
                answer.add(choice["logprobs"])
        if usage := event.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]
    return answer


def first_difference(one: ShortAnswer, other: ShortAnswer) -> int | None:
    """Index of the first token that differs; None if all are the same."""
    if one.tokens == other.tokens:
        return None
    pairs = zip(one.tokens, other.tokens, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(other.tokens))
