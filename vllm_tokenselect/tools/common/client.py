"""An asynchronous client of one server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import tenacity

_RETRIED = (429, 500, 502, 503, 504)
_TOKEN = "token_id:"  # vLLM's spelling of a token by its id
_EVENT = b"data: {"  # how a line of a streamed answer starts; the last one has [DONE] instead
# Above this lies the log-probability of the only token that is allowed, if the server masks first.
_CERTAIN = -1e-6


class ServerError(RuntimeError):
    """A server cannot be asked, or not this. The message says which, why, and what to do."""


class _Busy(Exception):
    """An error that may be gone at the next attempt."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how a server is asked.

    Attributes:
        url: without `/v1`.
        model: the name that it is served under.
        extra: more of a request's body, such as `vllm_xargs`.
        chat: ask `/v1/chat/completions`, in text, instead of `/v1/completions`, in tokens.
    """

    url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False


class Client:
    """Asks a server greedy requests, a limited number at a time.

    After a connection error, a time-out or the status 429, 500 or 502 to 504 a request is tried again, each
    time after a longer pause. Any other error ends the run. Streams are never tried again.

    Args:
        endpoint: where and how.
        concurrency: requests at a time.
        attempts: of each request, the first one included.
        timeout: seconds that an attempt may take.
        pause: seconds before the second attempt, about doubled before each that follows.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        concurrency: int = 4,
        attempts: int = 6,
        timeout: float = 600.0,
        pause: float = 1.0,
    ) -> None:
        self.endpoint = endpoint
        self._places = asyncio.Semaphore(concurrency)
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._attempts, self._pause = attempts, pause
        self._session: aiohttp.ClientSession | None = None
        self._fixed = {"model": endpoint.model, "temperature": 0.0}

    async def __aenter__(self) -> Self:
        key = os.environ.get("OPENAI_API_KEY")
        self._session = aiohttp.ClientSession(
            timeout=self._timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # vLLM closes idle connections after five seconds, perhaps just as they are used again.
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
        )
        return self

    async def __aexit__(self, *failure: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def say(self, tokens: list[int], text: str, max_tokens: int) -> str:
        """The text that follows a prompt.

        Args:
            tokens: of the prompt.
            text: the prompt for a chat.
            max_tokens: of the answer.
        """
        if self.endpoint.chat:
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
            choice = (await self.post("/v1/chat/completions", body))["choices"][0]
            return str(choice["message"]["content"] or "")
        body = {"prompt": tokens, "max_tokens": max_tokens}
        return str((await self.post("/v1/completions", body))["choices"][0]["text"])

    async def loss_of_next(self, tokens: list[int], following: int) -> float:
        """Negative log-likelihood, nats, of the token that follows a prompt.

        The request allows this token alone. Its log-probability is still the model's, because vLLM takes
        log-probabilities before it masks (`--logprobs-mode raw_logprobs`, the default).

        Raises:
            ServerError: when the server says another token.
        """
        body = {
            "prompt": tokens,
            "max_tokens": 1,
            "logprobs": 1,
            "allowed_token_ids": [following],
            "return_tokens_as_token_ids": True,
        }
        said = (await self.post("/v1/completions", body))["choices"][0]["logprobs"]
        if said["tokens"] != [f"{_TOKEN}{following}"]:
            raise ServerError(
                f"{self.endpoint.url} said {said['tokens']} where only the token {following} was "
                "allowed: perplexity needs vLLM's `allowed_token_ids`"
            )
        return -float(said["token_logprobs"][0])

    async def replay_losses(self, tokens: list[int], following: list[int]) -> list[float]:
        """Negative log-likelihoods, nats, of tokens that are decoded one after the other.

        This is vLLM's trace replay: the server decodes as always, replaces each token that it samples by
        the given one, and tells the log-probability of the given one.
        """
        body = {
            "token_ids": tokens,
            "sampling_params": {
                "temperature": 0.0,
                "max_tokens": len(following),
                "logprobs": 0,
                "trace_decode_token_ids": following,
                "extra_args": self.endpoint.extra.get("vllm_xargs"),
            },
        }
        answer = await self._send("/inference/v1/generate", {"model": self.endpoint.model, **body})
        said = answer["choices"][0]["logprobs"]["content"]
        if [entry["token_id"] for entry in said] != following:
            raise ServerError(f"{self.endpoint.url} did not replay the tokens that it was given")
        return [-float(entry["logprob"]) for entry in said]

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a greedy request of the model.

        Raises:
            ServerError: when the server refuses it, or does not answer in any attempt.
        """
        return await self._send(path, {**self._fixed, **body, **self.endpoint.extra})

    @property
    def is_full(self) -> bool:
        """Whether `concurrency` requests are open, so that the next one waits."""
        return self._places.locked()

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of the answer to a greedy request of the model, as they come.

        The request is sent once, so that its times are those of one attempt.

        Raises:
            ServerError: when the server refuses it, breaks off, or is not done in time.
        """
        assert self._session is not None, "use the client in `async with`"
        url = self.endpoint.url + path
        options = {"stream": True, "stream_options": {"include_usage": True}}
        asked = {**self._fixed, **body, **options, **self.endpoint.extra}
        try:
            async with self._places, self._session.post(url, json=asked) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:500]
                    raise ServerError(f"{url} answered HTTP {answer.status}: {text}")
                async for line in answer.content:
                    if line.startswith(_EVENT):
                        event: dict[str, Any] = json.loads(line[len(_EVENT) - 1 :])
                        if "error" in event:
                            raise ServerError(f"{url} broke off: {event['error']}")
                        yield event
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerError(f"{url} failed: {str(error) or type(error).__name__}") from error

    async def _send(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_exponential(self._pause, max=60 * self._pause)
            + tenacity.wait_random(0, self._pause),
            retry=tenacity.retry_if_exception_type((_Busy, aiohttp.ClientError, TimeoutError)),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    async with self._places:
                        return await self._once(path, body)
        except (_Busy, aiohttp.ClientError, TimeoutError) as error:
            raise ServerError(
                f"{self.endpoint.url}{path} failed {self._attempts} times, the last time with "
                f"{str(error) or type(error).__name__}; --resume continues from here"
            ) from error
        raise AssertionError("an attempt returns or raises")

    async def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        assert self._session is not None, "use the client in `async with`"
        async with self._session.post(self.endpoint.url + path, json=body) as answer:
            if answer.status == 200:
                found: dict[str, Any] = await answer.json()
                return found
            text = (await answer.text())[:500]
        if answer.status in _RETRIED:
            raise _Busy(f"HTTP {answer.status}: {text}")
        raise ServerError(f"{self.endpoint.url}{path} answered HTTP {answer.status}: {text}")


def is_masked(losses: list[float]) -> bool:
    """Whether every log-probability is that of the only token that was allowed."""
    return all(-loss > _CERTAIN for loss in losses)
