"""Requests that arrive at a rate, whether or not those before them are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from vllm_tokenselect.tools.common.client import Client
from vllm_tokenselect.tools.common.timing import TimedAnswer, timed


@dataclass(frozen=True)
class Arrived:
    """A request of many.

    Attributes:
        at_s: seconds after the first could have arrived.
        waited: whether it was sent late, because as many requests were open as the client allows.
        answer: timed from the arrival, so that a wait is part of its times.
    """

    at_s: float
    waited: bool
    answer: TimedAnswer


def poisson_arrivals(rate: float, count: int, seed: str) -> list[float]:
    """Arrival times, seconds, of a Poisson process that has `count` arrivals in `count / rate` seconds.

    Given their number, the arrivals of a Poisson process are uniform. So the rate is met exactly, even by
    few arrivals.

    Args:
        rate: arrivals a second.
    """
    random = Random(f"arrivals {seed}")
    return sorted(random.uniform(0.0, count / rate) for _ in range(count))


async def ask_as_they_arrive(
    client: Client,
    prompts: Sequence[list[int]],
    arrivals: Sequence[float],
    output_tokens: int,
    on_done: Callable[[], None] = lambda: None,
) -> list[Arrived]:
    """Send each prompt when it arrives, and wait for all answers.

    Args:
        arrivals: of each prompt, seconds from now.
        on_done: called after each answer.

    Returns:
        what became of each prompt, in their order.
    """
    begun = time.perf_counter()

    async def ask(prompt: list[int], at_s: float) -> Arrived:
        await asyncio.sleep(begun + at_s - time.perf_counter())
        waited = client.is_full
        answer = await timed(client, prompt, output_tokens, begun + at_s)
        on_done()
        return Arrived(at_s, waited, answer)

    return await asyncio.gather(*map(ask, prompts, arrivals))
