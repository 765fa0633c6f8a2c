"""Servers are asked in turn, with the same prompts, and everything that was asked is kept."""

import itertools
from dataclasses import replace

import pytest

from tests.tools.bench.server import StreamingServer
from tests.tools.common.server import MODEL
from tests.tools.common.words import Words
from vllm_tokenselect.tools.bench.prompts import Prompts
from vllm_tokenselect.tools.bench.run import RATE_SHARES, Bench, BenchSettings, Contender
from vllm_tokenselect.tools.common.client import Endpoint, ServerError

SETTINGS = BenchSettings(
    lengths=(100, 400),
    rounds=2,
    generations=3,
    output_tokens=5,
    rates=(50.0,),
    rate_length=100,
    requests=4,
    concurrency=8,
    timeout=5.0,
    seed=0,
    pause=0.0,
    settle=0.0,
)
ALONE = SETTINGS.rounds * SETTINGS.generations


@pytest.fixture
def servers():
    with StreamingServer() as a, StreamingServer() as b:
        b.layers = 3
        yield {"A": a, "B": b}


def bench_of(servers: dict[str, StreamingServer], **changed) -> Bench:
    contenders = [Contender(name, Endpoint(s.url, MODEL)) for name, s in servers.items()]
    return Bench(contenders, replace(SETTINGS, **changed), Prompts(Words(), 0))


async def test_servers_are_asked_in_turn(servers):
    bench = bench_of(servers, requests=0)
    words = []
    await bench.run(words.append)
    asked = [(s.prompt_tokens, s.round, s.generation, s.contender) for s in bench.measured.samples]
    assert asked == list(itertools.product((100, 400), range(2), range(3), "AB"))
    # Nobody is asked while another one answers.
    times = sorted((time, name) for name, s in servers.items() for time in s.times[1:])
    assert [name for _, name in times] == ["A", "B"] * (2 * ALONE)
    assert words == [f"{name}: {n} tokens" for n in (100, 400) for name in "AB" * ALONE]


async def test_all_get_the_same_new_prompts_and_each_again_for_every_generation(servers):
    await bench_of(servers).run()
    prompts = {
        name: [tuple(body["prompt"]) for body in server.bodies] for name, server in servers.items()
    }
    # The first warms a server up, with a prompt of its own.
    assert prompts["A"][0] != prompts["B"][0]
    assert sorted(prompts["A"][1:]) == sorted(prompts["B"][1:])
    alone = prompts["A"][1 : 1 + 2 * ALONE]
    assert [alone.count(prompt) for prompt in dict.fromkeys(alone)] == [3] * 4
    assert [len(prompt) for prompt in alone] == [100] * ALONE + [400] * ALONE
    at_rate = prompts["A"][1 + 2 * ALONE :]
    assert len(set(at_rate)) == len(at_rate) == 8
    assert not set(at_rate) & set(alone)


async def test_at_a_rate_the_same_requests_come_at_the_same_moments(servers):
    bench = bench_of(servers)
    await bench.run()
    found = [sample for sample in bench.measured.samples if sample.rate is not None]
    assert [s.contender for s in found] == (["A"] * 4 + ["B"] * 4) * 2
    moments = {
        (name, n): [s.at_s for s in found if (s.contender, s.round) == (name, n)]
        for name in "AB"
        for n in range(2)
    }
    assert moments["A", 0] == moments["B", 0] != moments["A", 1] == moments["B", 1]
    assert len(bench.measured.samples) == SETTINGS.total(2)


async def test_rates_follow_from_how_fast_the_first_server_is():
    with StreamingServer(first=0.1) as a, StreamingServer() as b:
        bench = bench_of({"A": a, "B": b}, rates=None, rounds=1, generations=1)
        await bench.run()
    (took,) = [
        s.answer.seconds
        for s in bench.measured.samples
        if (s.contender, s.prompt_tokens, s.rate) == ("A", 100, None)
    ]
    rates = list(dict.fromkeys(s.rate for s in bench.measured.samples if s.rate is not None))
    assert rates == pytest.approx([share / took for share in RATE_SHARES], rel=0.01)


async def test_what_was_selected_is_kept_for_each_length_and_rate(servers):
    bench = bench_of(servers)
    await bench.run()
    found = {(one.rate, one.prompt_tokens): one for one in bench.measured.selected}
    assert {one.contender for one in bench.measured.selected} == {"B"}
    assert list(found) == [(None, 100), (None, 400), (50.0, 100)]
    queries = 100 + SETTINGS.output_tokens - 1
    counts = found[None, 100].counts
    assert counts["in_context"] == ALONE * servers["B"].layers * queries * (queries + 1) / 2
    assert counts["attended"] == counts["in_context"] / 2
    assert counts["reused"] == 0.75 / 2 * ALONE * servers["B"].layers * (SETTINGS.output_tokens - 1)
    assert [one.reused for one in found.values()] == [0.75] * 3


async def test_where_others_ask_too_the_share_of_what_was_reused_is_unknown(servers):
    servers["B"].others = 7
    bench = bench_of(servers, requests=0)
    await bench.run()
    assert [one.reused for one in bench.measured.selected] == [None, None]


async def test_a_request_that_fails_is_a_sample_and_the_rest_goes_on(servers):
    bench = bench_of(servers)
    failing = servers["B"].failures

    def on_done(words: str) -> None:
        if words == "A: 400 tokens" and not failing:
            failing.append(400)

    await bench.run(on_done)
    failed = bench.measured.failures
    assert [(s.contender, s.prompt_tokens) for s in failed] == [("B", 400)] * ALONE
    assert all("HTTP 400" in s.answer.error for s in failed)
    assert len(bench.measured.samples) == SETTINGS.total(2)


async def test_a_server_that_answers_nothing_ends_it(servers):
    servers["B"].failures = [404]
    with pytest.raises(ServerError, match=r"B: .* answered HTTP 404"):
        await bench_of(servers).run()
