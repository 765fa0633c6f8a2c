"""A small real server that streams its answers token by token, and counts what it attends to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from tests.tools.common.server import MODEL, SmallServer
from vllm_tokenselect.tools.common.client import Client, Endpoint

MAX_MODEL_LEN = 4096


class StreamingServer(SmallServer):
    """Runs in a thread of its own while the block does.

    Args:
        first: seconds until the first token.
        each: seconds until each token that follows.

    Attributes:
        packed: tokens in one event.
        breaks_off: tokens after which each answer ends in an error; None for none.
        drops: whether it drops the connection there, without a word.
        said: tokens of each event so far.
        layers: that select; 0 for no such counters.
        others: tokens of the context of somebody else's query, before each look at the counters.
    """

    def __init__(self, first: float = 0.0, each: float = 0.0) -> None:
        super().__init__(max_model_len=MAX_MODEL_LEN, pause=first)
        self.each = each
        self.packed = 1
        self.breaks_off: int | None = None
        self.drops = False
        self.said: list[int] = []
        self.layers = 0
        self.others = 0
        self._looks = 0

    async def respond(self, request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        body = await request.json()  # which aiohttp has read already, and keeps
        response = web.StreamResponse()
        await response.prepare(request)
        said = 0
        while said < body["max_tokens"]:
            if said:
                await asyncio.sleep(self.each)
            if said == self.breaks_off:
                if self.drops:
                    assert request.transport is not None
                    request.transport.abort()
                else:
                    await self._say(response, {"error": {"message": "the engine is dead"}})
                return response
            self.said.append(min(self.packed, body["max_tokens"] - said))
            said += self.said[-1]
            # A token may leave no text, where a character is not whole yet.
            await self._say(response, {"choices": [{"text": ""}], "usage": None})
        await self._say(response, {"choices": [], "usage": {"completion_tokens": said}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _say(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def metrics(self, request: web.Request) -> web.Response:
        """Half of the context is attended to; of generated tokens' selections three of four are reused.

        In half of the layers generated tokens attend to what another layer selected.
        """
        if not self.layers:
            return web.Response(text="vllm:other_total 5\n")
        self._looks += 1
        queries = [len(body["prompt"]) + body["max_tokens"] - 1 for body in self.bodies]
        context = self.layers * sum(n * (n + 1) // 2 for n in queries) + self._looks * self.others
        generated = self.layers * sum(body["max_tokens"] - 1 for body in self.bodies)
        rows = {"reselected": generated / 8, "reused": 3 * generated / 8, "shared": generated / 2}
        rows["dense"] = 7 * self.layers
        told = {"tokens_attended_total{": context / 2, "tokens_in_context_total{": context}
        told |= {f'rows_total{{kind="{kind}",': count for kind, count in rows.items()}
        lines = [f'vllm:tokenselect_{name}engine="0"}} {count}' for name, count in told.items()]
        return web.Response(text="\n".join(lines) + "\n")


def client_of(server: SmallServer, concurrency: int = 8, timeout: float = 5.0) -> Client:
    return Client(Endpoint(server.url, MODEL), concurrency=concurrency, timeout=timeout)
