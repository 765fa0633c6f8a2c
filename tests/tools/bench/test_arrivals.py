"""Requests arrive as a Poisson process, whether or not those before them are answered."""

import asyncio
import time
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from tests.tools.bench.server import StreamingServer, client_of
from vllm_tokenselect.tools.bench.arrivals import ask_as_they_arrive, poisson_arrivals


def test_as_many_arrive_as_the_rate_says():
    arrivals = poisson_arrivals(4.0, 100, "a")
    assert len(arrivals) == 100
    assert arrivals == sorted(arrivals)
    assert arrivals[0] >= 0
    assert arrivals[-1] <= 25.0


def test_gaps_are_exponential():
    gaps = [later - earlier for earlier, later in pairwise(poisson_arrivals(2.0, 20_000, "a"))]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.02)
    # Of an exponential distribution the deviation is the mean, and 1 / e of all are above it.
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.05)
    assert fmean(gap > 0.5 for gap in gaps) == pytest.approx(0.368, abs=0.02)


def test_a_seed_says_when():
    assert poisson_arrivals(1.0, 5, "a") == poisson_arrivals(1.0, 5, "a")
    assert poisson_arrivals(1.0, 5, "a") != poisson_arrivals(1.0, 5, "b")


async def test_requests_are_sent_when_they_arrive_not_when_others_are_answered():
    with StreamingServer(first=1.0) as server:
        async with client_of(server) as client:
            begun = time.perf_counter()
            arrived = await ask_as_they_arrive(client, [[5], [6], [7]], [0.0, 0.1, 0.2], 2)
            took = time.perf_counter() - begun
    assert server.most == 3
    assert sorted(body["prompt"] for body in server.bodies) == [[5], [6], [7]]
    assert [one.at_s for one in arrived] == [0.0, 0.1, 0.2]
    assert not any(one.waited for one in arrived)
    assert all(1.0 <= one.answer.ttft_s <= took - one.at_s for one in arrived)


async def test_no_more_are_open_than_allowed_and_who_waits_does_so_on_the_clock():
    with StreamingServer(first=1.0) as server:
        async with client_of(server, concurrency=1) as client:
            arrived = await ask_as_they_arrive(client, [[5], [6], [7]], [0.0, 0.1, 0.2], 2)
    assert server.most == 1
    assert [one.waited for one in arrived] == [False, True, True]
    # The last one waits for two others, a second each, from the moment at which it arrived.
    assert arrived[2].answer.ttft_s >= 3 * 1.0 - 0.2


async def test_a_client_that_is_late_to_send_is_late_on_the_clock():
    with StreamingServer() as server:
        async with client_of(server) as client:
            asyncio.get_running_loop().call_later(0.05, time.sleep, 0.5)
            (one,) = await ask_as_they_arrive(client, [[5]], [0.1], 2)
    assert one.answer.ttft_s >= 0.05 + 0.5 - 0.1


async def test_one_that_fails_leaves_the_others_alone():
    with StreamingServer() as server:
        server.failures = [400]
        asked = []
        async with client_of(server) as client:
            begun = time.perf_counter()
            arrived = await ask_as_they_arrive(
                client, [[5], [6]], [0.0, 0.2], 2, lambda: asked.append(time.perf_counter())
            )
    assert [one.answer.error is None for one in arrived] == [False, True]
    assert len(asked) == 2
    assert asked[1] - begun >= 0.2
