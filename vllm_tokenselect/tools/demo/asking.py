"""The demo's questions: each asked on TOKENSELECT and with full attention, on the same server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.common.smollm2 import MODEL_NAME
from vllm_tokenselect.tools.demo.document import Fact, prompt
from vllm_tokenselect.tools.demo.figures import RequestFigures, wait_for_figures

OURS, FULL = "TOKENSELECT", "full attention"
_EXTRA = {OURS: {}, FULL: {"vllm_xargs": {"tokenselect": "off"}}}
# How often the server reads the document each way. The other questions find it in the prefix cache.
_READINGS = 2
# An answer is a few tokens of a sentence; what the model adds after it is not asked for.
_BODY = {"max_tokens": 8, "stop": ["\n", "."]}


@dataclass(frozen=True)
class Answer:
    """What was said to a question.

    Attributes:
        way: `OURS` or `FULL`.
        first_token: seconds.
        figures: what the request attended to.
    """

    fact: Fact
    way: str
    text: str
    first_token: float
    figures: RequestFigures

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
        ServerError: when the server refuses it, breaks off, says nothing, or writes no figures.
    """
    text, request_id, first_token = asyncio.run(
        _stream(server.base_url, prompt(fact), way, reading)
    )
    figures = wait_for_figures(server.log_path, request_id)
    if figures is None:
        raise ServerError(
            f"The server's log does not say what the request {request_id} attended to."
        )
    return Answer(fact, way, text, first_token, figures)


async def _stream(url: str, asked: str, way: str, reading: int) -> tuple[str, str, float]:
    """Text, id of the request, and seconds to the first token."""
    pieces: list[str] = []
    request_id, first_token = "", 0.0
    async with Client(Endpoint(url, MODEL_NAME, _EXTRA[way])) as client:
        # Requests of another salt share nothing in the prefix cache.
        body = {**_BODY, "prompt": asked, "cache_salt": f"reading {reading}"}
        begun = time.perf_counter()
        async for event in client.stream("/v1/completions", body):
            if not event.get("choices"):
                continue
            if not pieces:
                first_token = time.perf_counter() - begun
            request_id = event["id"]
            pieces.append(event["choices"][0]["text"])
    if not pieces:
        raise ServerError(f"{url} ended the stream without a token")
    return "".join(pieces), request_id, first_token
