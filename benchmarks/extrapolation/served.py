"""The ways of attending that are compared, each served by vLLM, and what is asked of a server."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.tools.common.server import VllmServer

FULL, NATIVE, REASSIGNED = "full", "native", "reassigned"
SINK_LOCAL, WINDOW = "sink+local", "window"
ROOM = 256  # tokens of context beyond the longest prompt, for what is said
NUM_SEQS = 8


@dataclass(frozen=True)
class ServedWay:
    """A way to attend, served by vLLM.

    Attributes:
        settings: TokenSelect's; None for vLLM's own CPU attention.
        overrides: of the model's configuration.
    """

    name: str
    settings: dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def stays_in_range(self) -> bool:
        """Whether no position passes what the model was trained for, however long the prompt."""
        return self.settings is not None and self.settings.get("positions") == "reassigned"


def served_ways(settings: dict[str, Any]) -> dict[str, ServedWay]:
    """Every way, by name, at one budget.

    The sink and the local window alone are the same selection with nothing left to select: one token, the
    least that there is, and the window as much larger. A model whose needle is a single token finds it even
    so; such a model is compared with a plain sliding window.

    Args:
        settings: TokenSelect's; each way has `positions` of its own, and what is left out has its default.
    """
    budget = TokenSelectConfig.from_mapping(settings)
    unselected = {"top_k": 1, "n_local": budget.n_local + budget.top_k - 1}
    reassigned = {**settings, "positions": "reassigned"}
    found = (
        ServedWay(REASSIGNED, reassigned),
        ServedWay(NATIVE, {"min_context": 0, **settings, "positions": "native"}),
        ServedWay(SINK_LOCAL, {**reassigned, **unselected}),
        ServedWay(
            WINDOW,
            overrides={"sliding_window": budget.n_init + budget.top_k + budget.n_local},
        ),
        ServedWay(FULL),
    )
    return {way.name: way for way in found}


def trained_length(model: Path) -> int:
    """Tokens of context that the model was trained for."""
    return int(json.loads((model / "config.json").read_text())["max_position_embeddings"])


def server(model: Path, way: ServedWay, longest_prompt: int, dtype: str) -> VllmServer:
    """A server that attends in this way, for prompts of up to `longest_prompt` tokens."""
    context = longest_prompt + ROOM
    overrides = dict(way.overrides)
    if not way.stays_in_range and context > trained_length(model):
        # vLLM's table of rotations ends there, and what is read beyond its end is no number at all.
        overrides["max_position_embeddings"] = context
    return VllmServer(
        model,
        backend="CPU_ATTN" if way.settings is None else "TOKENSELECT",
        settings=way.settings,
        extra_args=[
            *("--skip-tokenizer-init", "--dtype", dtype, "--max-model-len", str(context)),
            *("--max-num-seqs", str(NUM_SEQS), "--max-num-batched-tokens", "2048"),
            *("--block-size", "128", "--hf-overrides", json.dumps(overrides)),
        ],
        env={
            "VLLM_CPU_KVCACHE_SPACE": "3",  # GiB: two of the longest prompts
            # A step of 2,048 tokens takes seconds, but minutes on a machine that has other work to do.
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
        },
    )


class OutOfTime(Exception):
    """The time that was given is over."""


class Deadline:
    """The moment when a run is to end.

    Args:
        minutes: from now; None for as long as it takes.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def seconds_left(self) -> float | None:
        """Seconds, or None without an end.

        Raises:
            OutOfTime: when none are left.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left


class Asker:
    """What is asked of a running server, all of it greedy and in tokens.

    Every request ends at the deadline; then `OutOfTime` is raised.
    """

    def __init__(self, server: VllmServer, deadline: Deadline) -> None:
        self._model = server.model
        self._deadline = deadline
        # The server closes idle connections after five seconds, perhaps just as they are used again.
        self._client = openai.OpenAI(
            base_url=f"{server.base_url}/v1",
            api_key="none",
            max_retries=0,
            default_headers={"Connection": "close"},
        )

    def say(self, prompt: list[int], count: int) -> list[int]:
        """The `count` tokens that follow a prompt."""
        tokens: list[int] = self._complete(prompt, count, return_token_ids=True)["token_ids"]
        return tokens

    def say_all(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """The same for prompts that share a beginning.

        The first one goes ahead and leaves the beginning in the prefix cache for the others, which
        then go together.
        """
        first = self.say(prompts[0], count)
        with ThreadPoolExecutor(NUM_SEQS) as pool:
            return [first, *pool.map(lambda prompt: self.say(prompt, count), prompts[1:])]

    def losses(self, prompt: list[int]) -> list[float]:
        """Negative log-likelihoods [tokens - 1], nats, of the tokens of a prompt after its first."""
        entries = self._complete(prompt, 1, prompt_logprobs=0)["prompt_logprobs"]
        return [
            -entry[str(token)]["logprob"]
            for token, entry in zip(prompt[1:], entries[1:], strict=True)
        ]

    def _complete(self, prompt: list[int], count: int, **more: object) -> dict[str, Any]:
        seconds = self._deadline.seconds_left()
        try:
            answer = self._client.completions.with_raw_response.create(
                model=self._model,
                prompt=prompt,
                max_tokens=count,
                temperature=0,
                extra_body={"ignore_eos": True, **more},
                timeout=seconds,
            )
        except openai.APITimeoutError:
            raise OutOfTime from None
        # As it came: a model of each of a long prompt's tokens would take longer than to read it.
        choice: dict[str, Any] = json.loads(answer.content)["choices"][0]
        return choice
