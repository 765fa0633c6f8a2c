"""A small real server that speaks as much of OpenAI's and vLLM's API as an evaluation asks for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from math import log
from typing import Any, Self

from aiohttp import web

from tests.tools.common.words import Words

MODEL = "small"
MAX_MODEL_LEN = 2048


class SmallServer:
    """Runs in a thread of its own while the block does.

    Args:
        says: what follows a prompt, from the request's body.
        tokenizer: of its model.
        max_model_len: that it tells; None to tell none.
        pause: seconds that an answer takes.

    Attributes:
        failures: statuses that the next requests are answered with, before any is answered well.
        bodies: of the requests that were answered well, in their order.
        statuses: of all answers.
        times: of all answers, seconds.
        most: requests that were open at the same time, at most.
        tokenizes: whether there is a `/tokenize`.
        masks: whether log-probabilities are those after masking.
        attends: tokens attended to and in context, after each request; None for no such counters.
    """

    def __init__(
        self,
        says: Callable[[dict[str, Any]], str] = lambda body: "",
        tokenizer: Words | None = None,
        max_model_len: int | None = MAX_MODEL_LEN,
        pause: float = 0.0,
    ) -> None:
        self.says = says
        self.tokenizer = tokenizer or Words()
        self.max_model_len = max_model_len
        self.pause = pause
        self.models = [MODEL]
        self.failures: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.statuses: list[int] = []
        self.times: list[float] = []
        self.most = 0
        self.tokenizes = True
        self.masks = False
        self.replays = True
        self.attends: tuple[int, int] | None = None
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> int:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        for path, answer in (
            ("/v1/completions", self._complete),
            ("/v1/chat/completions", self._chat),
            ("/inference/v1/generate", self._replay),
        ):
            app.router.add_post(path, self._counted(answer))
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    def _counted(self, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._open += 1
            self.most = max(self.most, self._open)
            try:
                body = await request.json()
                await asyncio.sleep(self.pause)
                status = self.failures.pop(0) if self.failures else 200
                self.statuses.append(status)
                self.times.append(time.monotonic())
                if status != 200:
                    return web.json_response({"error": "not now"}, status=status)
                self.bodies.append(body)
                return await self.respond(request, answer(body))
            finally:
                self._open -= 1

        return handle

    async def respond(self, request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        """An answer as it is sent."""
        return web.json_response(answer)

    async def _models(self, request: web.Request) -> web.Response:
        entries = [
            {"id": name, "root": f"org/{name}", "max_model_len": self.max_model_len}
            for name in self.models
        ]
        return web.json_response({"data": entries})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def metrics(self, request: web.Request) -> web.Response:
        if self.attends is None:
            return web.Response(text="vllm:other_total 5\n")
        attended, in_context = (count * len(self.bodies) for count in self.attends)
        return web.Response(
            text=f'vllm:tokenselect_tokens_attended_total{{worker="0"}} {attended}.0\n'
            f'vllm:tokenselect_tokens_in_context_total{{worker="0"}} {in_context}.0\n'
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            raise web.HTTPNotFound
        body = await request.json()
        if "messages" in body:
            if self.tokenizer.chat_template is None:
                raise web.HTTPBadRequest
            chat = self.tokenizer.apply_chat_template(body["messages"])
            return web.json_response({"tokens": self.tokenizer.encode(chat, False)})
        tokens = self.tokenizer.encode(body["prompt"], body.get("add_special_tokens", True))
        return web.json_response({"tokens": tokens})

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"prompt": self.tokenizer.decode(body["tokens"])})

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if "allowed_token_ids" not in body:
            return {"choices": [{"text": self.says(body)}]}
        (token,) = body["allowed_token_ids"]
        logprob = 0.0 if self.masks else self.logprob(body["prompt"], token)
        said = {"tokens": [f"token_id:{token}"], "token_logprobs": [logprob]}
        return {"choices": [{"text": "", "logprobs": said}]}

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": {"content": self.says(body)}}]}

    def _replay(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.replays:
            raise web.HTTPForbidden(text="Restart vllm serve with --enable-scale-out")
        prompt, content = list(body["token_ids"]), []
        for token in body["sampling_params"]["trace_decode_token_ids"]:
            content.append({"token_id": token, "logprob": self.logprob(prompt, token)})
            prompt.append(token)
        return {"choices": [{"logprobs": {"content": content}}]}

    def logprob(self, prompt: list[int], token: int) -> float:
        """A model for which the token's share depends on the token and the length before it."""
        return log(1 / (2 + token % 7 + len(prompt) % 5))


def text_of(server: SmallServer, body: dict[str, Any]) -> str:
    """The prompt of a request, in text."""
    if "messages" in body:
        return str(body["messages"][0]["content"])
    return server.tokenizer.decode(body["prompt"])
