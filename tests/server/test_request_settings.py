"""A request may attend to its whole context, or select fewer tokens, on a server that selects."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest

from tests.oracle.cases import SETTINGS
from tests.oracle.model import OracleModel
from tests.server.conftest import FP32, SPARSE, Client, Completion, serving

pytestmark = pytest.mark.server

LENGTHS = (900, 1700, 2600)
MAX_TOKENS = 16
OFF = {"tokenselect": "off"}
FEW = 100  # of the 368 tokens that the server selects


@pytest.fixture(scope="module")
def documents(prompts) -> list[list[int]]:
    return [prompts(400 + index, length) for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def plain(smollm2, documents) -> tuple[list[Completion], str]:
    """What vLLM's own attention says, and its server's log."""
    with serving(smollm2, backend="CPU_ATTN", extra_args=FP32) as client:
        return client.complete_all(documents, MAX_TOKENS), client.server.log()


@pytest.fixture(scope="module")
def full_attention(plain) -> list[Completion]:
    return plain[0]


@pytest.fixture(scope="module")
def selected(sparse_client, documents) -> list[Completion]:
    """What a server that selects 368 tokens says."""
    return sparse_client.complete_all(documents, MAX_TOKENS)


def assert_same(answers: list[Completion], expected: list[Completion]) -> None:
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens == other.tokens
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_off_is_full_attention_and_harms_no_neighbor(
    sparse_client, documents, full_attention, selected
):
    for full, sparse in zip(full_attention, selected, strict=True):
        assert full.logprobs != pytest.approx(sparse.logprobs, abs=1e-2), (
            "the two are to be told apart"
        )
    with ThreadPoolExecutor(2 * len(documents)) as pool:
        off = [pool.submit(sparse_client.complete, d, MAX_TOKENS, **OFF) for d in documents]
        default = [pool.submit(sparse_client.complete, d, MAX_TOKENS) for d in documents]
        assert_same([answer.result() for answer in off], full_attention)
        assert_same([answer.result() for answer in default], selected)


def test_not_chosen_the_package_changes_nothing(sparse_client, plain):
    traces = (
        "Using custom scheduler class",
        "layers that select: ",
        "compiling the CPU kernels",
    )
    chosen, (_, not_chosen) = sparse_client.server.log(), plain
    assert all(trace in chosen for trace in traces), "otherwise their absence proves nothing"
    assert not [trace for trace in traces if trace in not_chosen]


def test_a_request_selects_as_few_tokens_as_it_asks_for(
    smollm2, sparse_client, documents, selected
):
    few = OracleModel(smollm2, replace(SETTINGS, top_k=FEW))
    document, said = documents[0], selected[0]
    answer = sparse_client.complete(document, MAX_TOKENS, tokenselect_top_k=FEW)
    tokens, logprobs, *_ = few.generate(document, MAX_TOKENS)
    assert answer.tokens == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
    assert answer.logprobs != pytest.approx(said.logprobs, abs=1e-2), "the two are to be told apart"


BAD = [
    ({"tokenselect": "none"}, "tokenselect='none' is neither"),
    ({"tokenselect_top_k": 0}, "tokenselect_top_k=0 cannot be used"),
    ({"tokenselect_top_k": 10**6}, "tokenselect_top_k=1000000 cannot be used"),
    ({"tokenselect_top_k": "many"}, "tokenselect_top_k='many' cannot be used"),
    ({"tokenselect_topk": 5}, "there is no extra argument 'tokenselect_topk'"),
    ({"tokenselect": "off", "tokenselect_top_k": 5}, "exclude each other"),
]
ALLOWED = (
    'tokenselect is "on" or "off", and tokenselect_top_k an integer from 1 to this server\'s '
    f"{SPARSE['top_k']}"
)


@pytest.mark.parametrize(("xargs", "named"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_value_is_a_bad_request_that_says_what_is_allowed(sparse_client, xargs, named):
    with pytest.raises(openai.BadRequestError) as refused:
        sparse_client.complete([5] * 200, 2, **xargs)
    assert refused.value.status_code == 400
    assert named in refused.value.body["message"]
    assert ALLOWED in refused.value.body["message"]


MESSAGES = [{"role": "user", "content": "Hello"}]
ENDPOINTS = {
    "completions": {"prompt": "Hello", "max_tokens": 2},
    "chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "responses": {"input": "Hello", "max_output_tokens": 2},
    "messages": {"messages": MESSAGES, "max_tokens": 2},  # Anthropic's
}


def post(client: Client, endpoint: str, **body: object) -> tuple[int, str]:
    """Status and text of an answer, whole or as a stream."""
    data = json.dumps({"model": client.model, **ENDPOINTS[endpoint], **body}).encode()
    url, headers = f"{client.server.base_url}/v1/{endpoint}", {"Content-Type": "application/json"}
    try:
        with urlopen(Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as refused:
        return refused.code, refused.read().decode()


UNREAD = [
    ({"vllm_xargs": {"tokenselect": "none"}}, "tokenselect='none' is neither"),
    ({"vllm_xargs": {"tokenselect_top_k": True}}, "tokenselect_top_k=True cannot be used"),
    ({"vllm_xargs": {"TOKENSELECT_top_k": 5}}, "there is no extra argument 'TOKENSELECT_top_k'"),
    ({"tokenselect": "off"}, "stands beside vllm_xargs"),
    ({"top_p": 2.0}, "top_p must be in (0, 1]"),  # vLLM's own
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_answers_a_bad_setting_as_it_answers_a_bad_top_p(
    sparse_client, endpoint, stream
):
    for body, message in UNREAD:
        status, text = post(sparse_client, endpoint, stream=stream, **body)
        assert (status, message in text) == (400, True), f"{body}: {status} {text}"
    for xargs in (OFF, {"tokenselect_top_k": 100}, {}):
        assert post(sparse_client, endpoint, stream=stream, vllm_xargs=xargs)[0] == 200


def test_settings_that_beam_search_would_not_read_are_refused(sparse_client):
    beams = {"use_beam_search": True, "n": 2}
    status, text = post(sparse_client, "completions", vllm_xargs=OFF, **beams)
    assert status == 400
    assert "'tokenselect' cannot be used with use_beam_search" in text
    assert post(sparse_client, "completions", **beams)[0] == 200


def hits(client: Client, prompt: list[int], **xargs: object) -> float:
    """Tokens of the prompt that came from the prefix cache."""
    before = client.metric("vllm:prefix_cache_hits_total")
    client.complete(prompt, 1, **xargs)
    return client.metric("vllm:prefix_cache_hits_total") - before


@pytest.mark.parametrize(
    ("first", "then"),
    [({}, OFF), (OFF, {}), ({}, {"tokenselect_top_k": 100}), ({"tokenselect_top_k": 100}, OFF)],
    ids=str,
)
def test_requests_of_other_settings_share_no_cached_blocks(sparse_client, prompts, first, then):
    prompt = prompts(450 + len(str(first)) * 10 + len(str(then)), 800)
    assert [hits(sparse_client, prompt, **xargs) for xargs in (first, then)] == [0, 0]
    again = [hits(sparse_client, prompt, **xargs) for xargs in (first, then)]
    assert again[0] == again[1] == 768
