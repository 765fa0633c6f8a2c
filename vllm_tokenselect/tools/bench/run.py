"""Ask servers in turn, A B A B: one request at a time, then at rates. Keep every sample."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from vllm_tokenselect.tools.bench.arrivals import Arrived, ask_as_they_arrive, poisson_arrivals
from vllm_tokenselect.tools.bench.machine import PeakMemory
from vllm_tokenselect.tools.bench.prompts import Prompts
from vllm_tokenselect.tools.bench.reuse import ReuseCounter
from vllm_tokenselect.tools.bench.samples import Measured, Sample, Selected
from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError
from vllm_tokenselect.tools.common.timing import timed

# The default rates, as shares of the rate at which the first server answers one request at a time.
RATE_SHARES = (0.5, 1.0, 2.0)
_WARM_UP_TOKENS = 300

# Called after each request, with words for it.
OnDone = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A server that is measured.

    Attributes:
        name: that its samples have.
        endpoint: where it is asked.
        pid: of its process; None where it runs elsewhere, and its memory is not known.
    """

    name: str
    endpoint: Endpoint
    pid: int | None = None


@dataclass(frozen=True)
class BenchSettings:
    """What is asked.

    Attributes:
        lengths: tokens of prompts that are asked one at a time.
        rounds: new prompts of each length, and runs at each rate.
        generations: how often to generate from each prompt; from the second time on the prompt comes from
            the prefix cache.
        output_tokens: of each answer.
        rates: requests a second; None for `RATE_SHARES`.
        rate_length: tokens of prompts at rates, one of `lengths`.
        requests: in each run at a rate; 0 leaves these runs out.
        concurrency: how many requests may be open at a time.
        timeout: seconds that a request may take.
        seed: of arrivals.
        pause: seconds before a server is asked. The threads of the server before it spin for a moment after
            their work, which must not slow this one down.
        settle: seconds before counters are read; workers publish them about once a second.
    """

    lengths: tuple[int, ...]
    rounds: int
    generations: int
    output_tokens: int
    rates: tuple[float, ...] | None
    rate_length: int
    requests: int
    concurrency: int
    timeout: float
    seed: int
    pause: float = 1.0
    settle: float = 2.0

    def total(self, contenders: int) -> int:
        """Number of requests, without those that warm servers up."""
        rates = len(RATE_SHARES if self.rates is None else self.rates)
        of_each = len(self.lengths) * self.generations + rates * self.requests
        return contenders * self.rounds * of_each


class Bench:
    """Servers side by side.

    Args:
        contenders: in the order in which they are asked. The others are compared with the first.
        prompts: where new ones come from.

    Attributes:
        measured: grows while it runs.
    """

    def __init__(
        self, contenders: Sequence[Contender], settings: BenchSettings, prompts: Prompts
    ) -> None:
        self._contenders = contenders
        self._settings = settings
        self._prompts = prompts
        self._on_done: OnDone = lambda words: None
        self._clients: dict[str, Client] = {}
        self._counters: dict[str, ReuseCounter] = {}
        self.measured = Measured()

    async def run(self, on_done: OnDone = lambda words: None) -> None:
        """Warm all servers up, then ask everything.

        Args:
            on_done: called after each request that is measured.

        Raises:
            ServerError: when a server fails while it is warmed up. Later failures are samples.
        """
        settings, self._on_done = self._settings, on_done
        async with AsyncExitStack() as stack:
            for contender in self._contenders:
                client = Client(
                    contender.endpoint, concurrency=settings.concurrency, timeout=settings.timeout
                )
                self._clients[contender.name] = await stack.enter_async_context(client)
                await self._warm_up(contender)
            for length in settings.lengths:
                await self._one_at_a_time(length)
                await self._count(length, None)
            for rate in self._rates():
                await self._at_rate(rate)
                await self._count(settings.rate_length, rate)

    async def _warm_up(self, contender: Contender) -> None:
        counter = ReuseCounter(contender.endpoint.url)
        length = min(_WARM_UP_TOKENS, max(self._settings.lengths))
        prompt = self._prompts.new(length)
        answer = await timed(self._clients[contender.name], prompt, self._settings.output_tokens)
        if answer.error is not None:
            raise ServerError(f"{contender.name}: {answer.error}")
        await asyncio.sleep(self._settings.settle)
        counter.learn_layers(length, answer)
        self._counters[contender.name] = counter

    async def _one_at_a_time(self, length: int) -> None:
        for round_number in range(self._settings.rounds):
            prompt = self._prompts.new(length)
            for generation in range(self._settings.generations):
                for contender in self._contenders:
                    await asyncio.sleep(self._settings.pause)
                    client = self._clients[contender.name]
                    with PeakMemory(contender.pid) as memory:
                        answer = await timed(client, prompt, self._settings.output_tokens)
                    self._keep(
                        [Arrived(0.0, False, answer)],
                        memory,
                        contender=contender.name,
                        prompt_tokens=length,
                        rate=None,
                        round=round_number,
                        generation=generation,
                    )
                    self._on_done(f"{contender.name}: {length:,} tokens")

    def _rates(self) -> tuple[float, ...]:
        """Requests a second; none if the first server answered no request, so that its speed is unknown."""
        settings = self._settings
        if settings.requests == 0:
            return ()
        if settings.rates is not None:
            return settings.rates
        took = [
            sample.answer.seconds
            for sample in self.measured.samples
            if sample.contender == self._contenders[0].name
            and sample.prompt_tokens == settings.rate_length
            and sample.generation == 0
            and sample.is_answered
        ]
        return tuple(float(f"{share / median(took):.3g}") for share in RATE_SHARES if took)

    async def _at_rate(self, rate: float) -> None:
        """The same requests at the same moments for every server."""
        settings = self._settings
        for round_number in range(settings.rounds):
            prompts = [self._prompts.new(settings.rate_length) for _ in range(settings.requests)]
            seed = f"{settings.seed} {rate} {round_number}"
            arrivals = poisson_arrivals(rate, settings.requests, seed)
            for contender in self._contenders:
                await asyncio.sleep(settings.pause)
                words = f"{contender.name}: {rate:g} requests/s"
                with PeakMemory(contender.pid) as memory:
                    answered = await ask_as_they_arrive(
                        self._clients[contender.name],
                        prompts,
                        arrivals,
                        settings.output_tokens,
                        partial(self._on_done, words),
                    )
                self._keep(
                    answered,
                    memory,
                    contender=contender.name,
                    prompt_tokens=settings.rate_length,
                    rate=rate,
                    round=round_number,
                    generation=0,
                )

    def _keep(self, answered: Iterable[Arrived], memory: PeakMemory, **told: Any) -> None:
        """Add samples of requests; `told` are the attributes of `Sample` that they share."""
        for arrived in answered:
            sample = Sample(
                at_s=arrived.at_s,
                waited=arrived.waited,
                answer=arrived.answer,
                worker_rss_mib=memory.worker_rss_mib,
                device_mib=memory.device_mib,
                **told,
            )
            self.measured.samples.append(sample)

    async def _count(self, length: int, rate: float | None) -> None:
        """Keep what each server has selected since the last reading of its counters."""
        await asyncio.sleep(self._settings.settle)
        for name, counter in self._counters.items():
            counts = counter.read()
            if counts is None:
                continue
            answers = [
                sample.answer
                for sample in self.measured.samples
                if (sample.contender, sample.prompt_tokens, sample.rate) == (name, length, rate)
            ]
            reused = counter.reused_share(counts, answers)
            self.measured.selected.append(Selected(name, length, rate, counts, reused))
