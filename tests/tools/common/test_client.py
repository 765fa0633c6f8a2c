"""The client asks so many at a time, tries again what may go well the next time, and nothing else."""

import asyncio
from itertools import pairwise
from math import exp

import pytest

from tests.tools.common.server import MODEL, SmallServer
from vllm_tokenselect.tools.common.client import Client, Endpoint, ServerError, is_masked
from vllm_tokenselect.tools.evaluate.run import step_by_step

QUICK = {"pause": 0.01, "timeout": 5.0}


@pytest.fixture
def server():
    with SmallServer(says=lambda body: "yes") as started:
        yield started


def client_of(server: SmallServer, **options) -> Client:
    return Client(Endpoint(server.url, MODEL), **{**QUICK, **options})


async def test_a_prompt_of_tokens_is_answered(server):
    async with client_of(server) as client:
        assert await client.say([1, 2, 3], "", 7) == "yes"
    (body,) = server.bodies
    assert body == {"model": MODEL, "temperature": 0.0, "prompt": [1, 2, 3], "max_tokens": 7}


async def test_a_chat_is_asked_in_text_with_the_extra_arguments(server):
    endpoint = Endpoint(server.url, MODEL, {"vllm_xargs": {"tokenselect": "off"}}, chat=True)
    async with Client(endpoint, **QUICK) as client:
        assert await client.say([1], "What?", 7) == "yes"
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "What?"}]
    assert body["vllm_xargs"] == {"tokenselect": "off"}


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_what_may_pass_is_tried_again(server, status):
    server.failures = [status, status]
    async with client_of(server) as client:
        assert await client.say([1], "", 1) == "yes"
    assert server.statuses == [status, status, 200]


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_what_is_the_requests_own_fault_is_not_tried_again(server, status):
    server.failures = [status]
    async with client_of(server) as client:
        with pytest.raises(ServerError, match=f"answered HTTP {status}: .*not now"):
            await client.say([1], "", 1)
    assert server.statuses == [status]


async def test_pauses_between_attempts_grow(server):
    server.failures = [503] * 4
    async with client_of(server, pause=0.05, attempts=5) as client:
        assert await client.say([1], "", 1) == "yes"
    pauses = [later - earlier for earlier, later in pairwise(server.times)]
    # 0.05, 0.1, 0.2 and 0.4 s, each with as much as 0.05 s more.
    assert pauses[0] >= 0.05
    assert pauses[3] >= 0.4


async def test_attempts_come_to_an_end_that_says_so(server):
    server.failures = [503] * 10
    async with client_of(server, attempts=3) as client:
        with pytest.raises(ServerError, match="failed 3 times, the last time with HTTP 503"):
            await client.say([1], "", 1)
    assert server.statuses == [503] * 3


async def test_a_server_that_is_gone_is_named():
    with SmallServer() as server:
        url = server.url
    async with Client(Endpoint(url, MODEL), **QUICK, attempts=2) as client:
        with pytest.raises(ServerError, match=f"{url}/v1/completions failed 2 times.*--resume"):
            await client.say([1], "", 1)


async def test_an_answer_that_does_not_come_in_time_is_asked_for_again():
    with SmallServer(pause=1.0) as server:
        async with client_of(server, attempts=2, timeout=0.1) as client:
            with pytest.raises(
                ServerError, match="failed 2 times, the last time with TimeoutError"
            ):
                await client.say([1], "", 1)


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_no_more_requests_are_open_than_allowed(concurrency):
    with SmallServer(pause=0.05) as server:
        async with client_of(server, concurrency=concurrency) as client:
            await asyncio.gather(*(client.say([i], "", 1) for i in range(9)))
        assert server.most == concurrency
        assert len(server.bodies) == 9


async def test_losses_step_by_step_are_those_of_the_last_tokens_each_after_all_before_it(server):
    tokens = list(range(40, 70))
    async with client_of(server) as client:
        losses = await step_by_step(client, tokens, 8)
    expected = [-server.logprob(tokens[:i], tokens[i]) for i in range(22, 30)]
    assert losses == pytest.approx(expected)
    assert server.bodies[0]["prompt"] == tokens[:22], (
        "the first leaves the text in the prefix cache"
    )
    assert sorted(len(body["prompt"]) for body in server.bodies) == list(range(22, 30))
    assert all(body["max_tokens"] == 1 for body in server.bodies)


async def test_a_replayed_text_has_the_same_losses(server):
    tokens = list(range(40, 70))
    async with client_of(server) as client:
        replayed = await client.replay_losses(tokens[:22], tokens[22:])
        assert replayed == pytest.approx(await step_by_step(client, tokens, 8))
    assert server.bodies[0]["sampling_params"]["trace_decode_token_ids"] == tokens[22:]


async def test_log_probabilities_after_masking_are_noticed(server):
    async with client_of(server) as client:
        real = [await client.loss_of_next([1, 2], token) for token in (3, 4)]
        server.masks = True
        masked = [await client.loss_of_next([1, 2], token) for token in (3, 4)]
    assert not is_masked(real)
    assert is_masked(masked)
    assert 0 < exp(-real[0]) < 1
