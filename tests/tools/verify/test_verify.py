"""`tokenselect verify` passes a server that selects, and says of any other what is wrong with it."""

import json
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from tests.tools.common.server import SmallServer
from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.verify import counting
from vllm_tokenselect.tools.verify.prompts import SHORT, as_long_as, paragraphs

KEY = "the right one"
MAX_MODEL_LEN = 4096


def count(text: str) -> int:
    """Tokens of a text, for this server: its words."""
    return len(text.split())


def switch(body: dict[str, Any]) -> str:
    return str(body["vllm_xargs"]["tokenselect"])


class SelectingServer(SmallServer):
    """Streams an answer, and counts as vLLM with TOKENSELECT does.

    Attributes:
        counts: whether it runs on TOKENSELECT.
        selects_from: the shortest prompt that it selects among.
        key: API key; None for none.
        refuses_off: what it answers to a request for full attention; None to serve it.
        differs: whether its answer depends on the attention.
        margin: nats between the two likeliest tokens.
        others: tokens of the context of somebody else's requests, at each look at the counters.
    """

    def __init__(self) -> None:
        super().__init__(max_model_len=MAX_MODEL_LEN)
        self.counts = True
        self.selects_from = 500
        self.key: str | None = None
        self.refuses_off: str | None = None
        self.differs = False
        self.margin = 1.0
        self.others = 0
        self._looks = 0

    async def _models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized
        return await super()._models(request)

    async def respond(self, request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        body = self.bodies[-1]
        if switch(body) == "off" and self.refuses_off:
            self.bodies.pop()
            raise web.HTTPBadRequest(text=self.refuses_off)
        response = web.StreamResponse()
        await response.prepare(request)
        for n in range(body["max_tokens"]):
            token = f"token_id:{n + (self.differs and switch(body) == 'off' and n > 3)}"
            likely = {token: -0.1, "token_id:99": -0.1 - self.margin}
            said = {"tokens": [token], "token_logprobs": [-0.1], "top_logprobs": [likely]}
            await self._say(response, {"choices": [{"text": "", "logprobs": said}]})
        usage = {"prompt_tokens": count(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self._say(response, {"choices": [], "usage": usage})
        return response

    async def _say(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.counts:
            return web.Response(text="vllm:other_total 5\n")
        self._looks += 1
        lengths = {id(body): count(body["prompt"]) for body in self.bodies}
        selecting = [
            lengths[id(body)]
            for body in self.bodies
            if switch(body) == "on" and lengths[id(body)] > self.selects_from
        ]
        context = sum(lengths.values()) + self._looks**2 * self.others
        rows = {"reselected": len(selecting), "dense": len(lengths) - len(selecting)}
        lines = [f'rows_total{{kind="{kind}"}} {number}' for kind, number in rows.items()]
        lines.append(f"tokens_attended_total {context - sum(selecting) / 2}")
        lines.append(f"tokens_in_context_total {context}")
        return web.Response(text="".join(f"vllm:tokenselect_{line}\n" for line in lines))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(counting, "_EVERY", 0.01)
    monkeypatch.setattr(counting, "_PATIENCE", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with SelectingServer() as started:
        yield started


def verify(url: str, *options: str) -> tuple[int, dict[str, tuple[str, str]], dict[str, Any]]:
    """Exit status, each check's state and words, and all that was told."""
    result = CliRunner().invoke(app, ["verify", url, "--json", *options])
    told = json.loads(result.output)
    checks = {check["name"]: (check["state"], check["said"]) for check in told["checks"]}
    assert told["ok"] == (result.exit_code == 0)
    return result.exit_code, checks, told


def test_a_server_that_selects_passes(server):
    status, checks, told = verify(server.url)
    assert status == 0
    assert {name: state for name, (state, _) in checks.items()} == dict.fromkeys(
        ("answers", "agrees", "selects", "is timed"), "pass"
    )
    assert "attended to 50.0% of the context" in checks["selects"][1]
    assert told["measured"]["counts"]["reselected"] == 1
    assert 0.9 * MAX_MODEL_LEN < told["measured"]["prompt_tokens"] < MAX_MODEL_LEN - 32
    assert told["measured"]["on"]["ttft_s"] > 0


def test_no_request_finds_another_ones_prompt_in_the_prefix_cache(server):
    verify(server.url)
    assert len({body["cache_salt"] for body in server.bodies}) == len(server.bodies) == 4


def test_the_verdicts_are_printed_for_people_too(server):
    server.counts = False
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["verify", server.url])
    assert result.exit_code == 1
    assert "fail    selects: " in result.output
    assert f"{server.url} is not verified." in result.output


def test_a_server_that_cannot_be_reached_fails():
    status, checks, _ = verify("http://127.0.0.1:9")
    assert (status, list(checks)) == (1, ["answers"])
    assert "does not answer" in checks["answers"][1]


@pytest.mark.parametrize("given", [(), ("--api-key", "another")], ids=["none", "another"])
def test_a_wrong_key_fails_and_is_called_one(server, given):
    server.key = KEY
    status, checks, _ = verify(server.url, *given)
    assert status == 1
    assert "refuses the API key (HTTP 401)" in checks["answers"][1]


@pytest.mark.parametrize("given", ["option", "variable"])
def test_the_right_key_is_sent(server, given, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY if given == "variable" else "another")
    status, _, _ = verify(server.url, *(("--api-key", KEY) if given == "option" else ()))
    assert status == 0


def test_a_server_without_tokenselect_fails(server):
    server.counts = False
    status, checks, _ = verify(server.url)
    assert status == 1
    assert checks["answers"][0] == "pass"
    assert "runs without --attention-backend TOKENSELECT" in checks["selects"][1]


def test_a_server_that_takes_no_prompt_long_enough_to_select_fails_and_the_rest_is_told(server):
    server.selects_from = 5000
    status, checks, _ = verify(server.url)
    assert status == 1
    said = checks["selects"][1]
    assert "the server takes no longer ones, so it never selects: lower top_k" in said
    assert checks["agrees"][0] == checks["is timed"][0] == "pass"


def test_a_prompt_that_was_asked_too_short_is_told_from_a_server_that_never_selects(server):
    status, checks, _ = verify(server.url, "--length", "300")
    assert status == 1
    assert "ask with a larger --length" in checks["selects"][1]


def test_full_attention_that_is_not_served_is_unknown_and_fails_nothing(server):
    server.refuses_off = 'tokenselect="off" cannot be served here: positions are reassigned'
    status, checks, _ = verify(server.url)
    assert status == 0
    assert checks["agrees"][0] == "unknown"
    assert "positions are reassigned" in checks["agrees"][1]
    assert checks["selects"][0] == "pass"


def test_another_answer_to_a_short_prompt_fails(server):
    server.differs = True
    status, checks, _ = verify(server.url)
    assert (status, checks["agrees"][0]) == (1, "fail")
    parts = "token 5 is another than with full attention, where nothing was selected"
    assert parts in checks["agrees"][1]


def test_two_tokens_that_rounding_may_swap_are_no_failure(server):
    server.differs, server.margin = True, 0.01
    status, checks, _ = verify(server.url)
    assert (status, checks["agrees"][0]) == (0, "unknown")
    assert "0.010 nats apart" in checks["agrees"][1]


def test_settings_that_select_in_short_prompts_may_answer_differently(server):
    server.differs, server.selects_from = True, 50
    status, checks, _ = verify(server.url)
    assert (status, checks["agrees"][0]) == (0, "unknown")
    assert "select among so few tokens already" in checks["agrees"][1]


def test_counts_that_are_others_too_prove_nothing(server):
    server.others = 7
    status, checks, _ = verify(server.url)
    assert (status, checks["selects"][0]) == (0, "unknown")
    assert "other requests were served meanwhile" in checks["selects"][1]


@pytest.mark.parametrize("length", [1000, 8192, 131072])
def test_prompts_are_almost_as_long_as_they_should_be(tokenizer, length):
    short = len(tokenizer.encode(paragraphs(SHORT)))
    found = len(tokenizer.encode(as_long_as(length, short)))
    assert 0.85 * length <= found <= length
