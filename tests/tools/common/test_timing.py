"""The tokens of a streamed answer are timed, and an answer that fails says why."""

import time

import pytest

from tests.tools.bench.server import StreamingServer, client_of
from tests.tools.common.server import MODEL, SmallServer
from vllm_tokenselect.tools.common.client import Client, Endpoint
from vllm_tokenselect.tools.common.timing import timed


@pytest.fixture
def server():
    with StreamingServer(first=0.2, each=0.1) as started:
        yield started


async def test_the_first_token_and_those_after_it_are_timed(server):
    async with client_of(server) as client:
        begun = time.perf_counter()
        answer = await timed(client, [5, 6, 7], 5)
        took = time.perf_counter() - begun
    # Nothing is early, and however late a busy machine is, the parts make the whole.
    assert answer.ttft_s >= 0.2
    assert 0.2 + 4 * 0.1 <= answer.seconds <= took
    assert answer.ttft_s < answer.seconds - 0.1
    assert answer.seconds == pytest.approx(answer.ttft_s + 4 * answer.tpot_ms / 1000)
    assert (answer.output_tokens, answer.error) == (5, None)
    (body,) = server.bodies
    assert body["prompt"] == [5, 6, 7]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (5, True, 0.0)


async def test_tokens_that_come_together_count_as_many(server):
    server.packed = 3
    async with client_of(server) as client:
        answer = await timed(client, [5], 7)
    assert answer.output_tokens == 7
    assert len(server.said) == 3
    assert answer.seconds == pytest.approx(answer.ttft_s + 6 * answer.tpot_ms / 1000)


async def test_a_request_that_arrived_earlier_has_waited(server):
    async with client_of(server) as client:
        begun = time.perf_counter() - 10
        answer = await timed(client, [5], 2, begun)
        assert answer.seconds <= time.perf_counter() - begun
    assert answer.ttft_s >= 10.2
    assert answer.seconds >= 10.2 + 0.1


async def test_a_refused_request_says_why_and_is_not_sent_again(server):
    server.failures = [503]
    async with client_of(server) as client:
        answer = await timed(client, [5], 5)
    assert answer.error.endswith('/v1/completions answered HTTP 503: {"error": "not now"}')
    assert (answer.ttft_s, answer.tpot_ms, answer.output_tokens) == (None, None, 0)
    assert server.statuses == [503]


@pytest.mark.parametrize(
    ("drops", "named"), [(False, "broke off: .*the engine is dead"), (True, "failed: ")]
)
async def test_an_answer_that_breaks_off_has_failed(server, drops, named):
    server.breaks_off, server.drops = 2, drops
    async with client_of(server) as client:
        answer = await timed(client, [5], 5)
    assert pytest.raises(AssertionError, match=named).matches(AssertionError(answer.error))
    assert (answer.tpot_ms, answer.output_tokens) == (None, 2)


async def test_an_answer_that_does_not_come_in_time_has_failed(server):
    async with client_of(server, timeout=0.1) as client:
        answer = await timed(client, [5], 5)
    assert "imeout" in answer.error
    assert answer.seconds >= 0.1
    assert answer.ttft_s is None


async def test_an_answer_without_a_token_has_failed():
    with SmallServer() as server:  # which does not stream
        async with Client(Endpoint(server.url, MODEL)) as client:
            answer = await timed(client, [5], 5)
    assert answer.error == f"{server.url} ended the stream without a token"


async def test_a_server_that_is_gone_is_named():
    with StreamingServer() as server:
        client = client_of(server)
    async with client:
        answer = await timed(client, [5], 5)
    assert answer.error.startswith(f"{server.url}/v1/completions failed: ")
