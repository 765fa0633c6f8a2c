"""The middleware that closes a server but for its clients' paths, as ASGI applications know it."""

import asyncio

import pytest

from vllm_tokenselect.guard import ClientsOnly


async def served(scope, receive, send):
    await send({"type": "served"})


def told(scope):
    """What the middleware sends for a scope, in front of an application that sends `served`."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(ClientsOnly(served)(scope, None, send))
    return sent


def http(path, **more):
    return told({"type": "http", "path": path, **more})


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/health", "/metrics"])
def test_paths_of_clients_probes_and_metrics_are_passed_on(path):
    assert http(path) == [{"type": "served"}]


@pytest.mark.parametrize(
    "path", ["/", "", "/invocations", "/v1", "/v10/models", "/x/v1/models", "/health/../tokenize"]
)
def test_any_other_path_is_not_found(path):
    start, body = http(path)
    assert (start["type"], start["status"]) == ("http.response.start", 404)
    assert b"/v1" in body["body"]


def test_paths_are_those_below_the_path_of_a_proxy():
    assert http("/llm/v1/models", root_path="/llm") == [{"type": "served"}]
    assert http("/llm/invocations", root_path="/llm")[0]["status"] == 404


def test_websockets_are_closed_in_the_same_way():
    assert told({"type": "websocket", "path": "/v1/realtime"}) == [{"type": "served"}]
    [closed] = told({"type": "websocket", "path": "/elsewhere"})
    assert closed["type"] == "websocket.close"


def test_the_start_of_the_application_passes():
    assert told({"type": "lifespan"}) == [{"type": "served"}]
