"""The demo's questions: each asked on TOKENSELECT and with full attention, on the same server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_tokenselect.cli.document import Fact, prompt
from vllm_tokenselect.cli.figures import RequestFigures, wait_for_figures
from vllm_tokenselect.cli.model import MODEL_NAME
from vllm_tokenselect.cli.server import VllmServer
from vllm_tokenselect.evaluation.client import Client, Endpoint, ServerError

OURS, FULL = "TOKENSELECT", "full attention"
_EXTRA = {OURS: {}, FULL: {"vllm_xargs": {"tokenselect": "off"}}}
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


def in_turn(facts: Sequence[Fact]) -> Iterator[tuple[Fact, str]]:
    """Every question both ways, A B B A: whatever drifts on the machine strikes both alike."""
    for number, fact in enumerate(facts):
        for way in (OURS, FULL) if number % 2 == 0 else (FULL, OURS):
            yield fact, way


def ask(server: VllmServer, fact: Fact, way: str) -> Answer:
    """Ask one question, alone on the server, and wait for what it attended to.

    Raises:
        ServerError: when the server refuses it, breaks off, says nothing, or writes no figures.
    """
    text, request_id, first_token = asyncio.run(_stream(server.base_url, prompt(fact), way))
    figures = wait_for_figures(server.log_path, request_id)
    if figures is None:
        raise ServerError(
            f"The server's log does not say what the request {request_id} attended to."
        )
    return Answer(fact, way, text, first_token, figures)


async def _stream(url: str, asked: str, way: str) -> tuple[str, str, float]:
    """Text, id of the request, and seconds to the first token."""
    pieces: list[str] = []
    request_id, first_token = "", 0.0
    async with Client(Endpoint(url, MODEL_NAME, _EXTRA[way])) as client:
        begun = time.perf_counter()
        async for event in client.stream("/v1/completions", {**_BODY, "prompt": asked}):
            if not event.get("choices"):
                continue
            if not pieces:
                first_token = time.perf_counter() - begun
            request_id = event["id"]
            pieces.append(event["choices"][0]["text"])
    if not pieces:
        raise ServerError(f"{url} ended the stream without a token")
    return "".join(pieces), request_id, first_token
