"""The demo's questions: each asked on TOKENSELECT and with full attention, on the same server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.common.server_facts import selection_counts
from vllm_tokenselect.tools.common.smollm2 import MODEL_NAME
from vllm_tokenselect.tools.demo.document import Fact, prompt
from vllm_tokenselect.tools.demo.figures import Attended, wait_for_figures

OURS, FULL = "TOKENSELECT", "full attention"
_EXTRA = {OURS: {}, FULL: {"vllm_xargs": {"tokenselect": "off"}}}
# How often the server reads the document each way. The other questions find it in the prefix cache.
_READINGS = 2


@dataclass(frozen=True)
class Answer:
    """What was said to a question.

    Attributes:
        way: `OURS` or `FULL`.
        first_token: seconds.
        read: tokens of the prompt that were not in the prefix cache.
        attended: what the request attended to.
    """

    fact: Fact
    way: str
    text: str
    first_token: float
    read: int
    attended: Attended

    @property
    def is_right(self) -> bool:
        """Whether the answer begins with what the document says, and not with more of a number."""
        return re.match(rf"\s*{re.escape(self.fact.answer)}\b", self.text) is not None


def in_turn(facts: Sequence[Fact]) -> Iterator[tuple[int, Fact, str]]:
    """Number of the reading of the document, and every question both ways.

    Questions go A B B A, and readings too: whatever drifts on the machine strikes both ways alike.
    """
    for number, fact in enumerate(facts):
        reading = number * _READINGS // len(facts)
        for way in (OURS, FULL) if number % 2 == reading % 2 else (FULL, OURS):
            yield reading, fact, way


def ask(server: VllmServer, fact: Fact, way: str, reading: int) -> Answer:
    """Ask one question, alone on the server, and wait for what it attended to.

    Args:
        server: which reads the document where no question of this reading was asked this way before.
        fact: what is asked for.
        way: `OURS` or `FULL`.
        reading: its number.

    Raises:
        ServerError: when the server refuses it, breaks off, says nothing, or does not count it.
    """
    before = selection_counts(server.base_url)
    text, usage, first_token = asyncio.run(_stream(server.base_url, prompt(fact), way, reading))
    length = usage["prompt_tokens"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    # The last token is generated, but never a query.
    contexts = range(cached + 1, length + usage["completion_tokens"])
    attended = wait_for_figures(server.base_url, before, contexts, _num_layers(server.model))
    if attended is None:
        raise ServerError(
            f"{server.base_url}/metrics does not say what the question attended to: {fact.question}"
        )
    # What comes after the answer's sentence is not asked for.
    text = re.split(r"[.\n]", text, maxsplit=1)[0]
    return Answer(fact, way, text, first_token, length - cached, attended)


def _num_layers(model: str) -> int:
    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    return int(config["num_hidden_layers"])


async def _stream(
    url: str, asked: str, way: str, reading: int
) -> tuple[str, dict[str, Any], float]:
    """Text, the server's count of its tokens, and seconds to the first token."""
    pieces: list[str] = []
    usage, first_token = None, 0.0
    async with Client(Endpoint(url, MODEL_NAME, _EXTRA[way])) as client:
        # Requests of another salt share nothing in the prefix cache.
        body = {"max_tokens": 8, "prompt": asked, "cache_salt": f"reading {reading}"}
        begun = time.perf_counter()
        async for event in client.stream("/v1/completions", body):
            usage = event.get("usage") or usage
            if not event.get("choices"):
                continue
            if not pieces:
                first_token = time.perf_counter() - begun
            pieces.append(event["choices"][0]["text"])
    if not pieces or usage is None:
        raise ServerError(f"{url} ended the stream before the answer was whole")
    return "".join(pieces), usage, first_token
