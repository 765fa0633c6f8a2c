"""Decoding with the Selection Cache, step by step, is what the method defines.

Requests come, end and are preempted in between; what a request attends to depends on its own tokens
alone, and is the same when its tokens are computed again, several at a time.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.method.definition import HEAD_SIZE
from tests.method.serving import METHOD, Request, Server
from tests.oracle.step import ReferenceStep
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import FULL_ATTENTION


@pytest.fixture(params=[ReferenceStep, CpuStep])
def server(request) -> Server:
    torch.manual_seed(0)
    return Server(request.param)


def kinds(request: Request) -> list[str]:
    return [kind for p, (_, kind) in request.rows.items() if p >= request.prompt]


def test_every_token_attends_to_what_the_definition_says(server):
    long, short = Request("longer", 90), Request("short", 20)
    assert {"reselected", "reused"} == set(kinds(long)), "the test should see both"
    assert {"dense", "reselected", "reused"} == set(kinds(short))
    server.start(long, short)
    server.step((long, 64), (short, 20))
    server.step((short, 1), (long, 26))
    for _ in range(90):
        server.step((long, 1), (short, 1))


def test_recomputed_tokens_decide_as_they_did_the_first_time(server):
    request, other = Request("preempted", 90), Request("other", 60)
    server.start(request, other)
    server.step((request, 90))
    server.step((other, 60))
    for _ in range(60):
        server.step((request, 1), (other, 1))
    server.stop(request)
    for _ in range(10):
        server.step((other, 1))
    server.start(request)
    server.step((request, 64), (other, 1))
    server.step((other, 1), (request, 60))  # the tail and 34 generated tokens at once
    server.step((request, 26))
    for _ in range(20):
        server.step((request, 1), (other, 1))


def test_a_seat_given_to_another_request_keeps_nothing_of_the_one_before(server):
    for name in "abcdef":
        first, second = Request(name, 90), Request(name + "2", 100)
        server.start(first)
        server.step((first, 90))
        for _ in range(5):
            server.step((first, 1))
        server.stop(first)
        server.start(second)  # the same seat
        server.step((second, 100))
        for _ in range(3):
            server.step((second, 1))
        server.stop(second)


def test_requests_with_settings_of_their_own_keep_to_them_beside_others(server):
    requests = [
        Request("default", 80),
        Request("fewer", 80, top_k=7),
        Request("off", 80, top_k=FULL_ATTENTION),
    ]
    server.start(*requests)
    server.step(*((request, 80) for request in requests))
    for _ in range(40):
        server.step(*((request, 1) for request in requests))
    assert set(kinds(requests[2])) == {"dense"}


def test_the_counters_are_those_of_counting_tokens_one_by_one(server):
    requests = [Request("longer", 90), Request("short", 20), Request("off", 70, FULL_ATTENTION)]
    server.start(*requests)
    server.step(*((request, request.prompt) for request in requests))
    for _ in range(30):
        server.step(*((request, 1) for request in requests))
    expected = dict.fromkeys(("reselected", "reused", "shared", "dense"), 0)
    attended = context = 0
    for request in requests:
        tail = METHOD.tail_start(request.prompt)
        dense_prompt = False
        for position in range(request.done):
            visible, kind = request.rows[position]
            attended, context = attended + len(visible), context + position + 1
            starts_a_row = position >= tail or position % METHOD.query_chunk == 0
            joins_the_row_before = kind == "dense" and dense_prompt and position < request.prompt
            expected[kind] += starts_a_row and not joins_the_row_before
            dense_prompt = kind == "dense"
    assert server.counts.tolist() == [*expected.values(), attended, context]


def test_from_a_threshold_of_one_on_no_row_takes_part():
    batch = BatchRequests(*(np.array([x], np.int32) for x in (0, 1, 90, METHOD.top_k)))
    starts, ends = np.array([0, 1], np.int32), np.array([100], np.int32)
    for threshold, caches in ((0.9, True), (1.0, False)):
        method = replace(METHOD, similarity_threshold=threshold)
        assert SelectionPlan.build(starts, ends, batch, method).caches.tolist() == [caches]


def test_a_needle_that_leaves_the_local_window_while_a_selection_is_reused_is_still_found(server):
    request, position = Request("needle", 90), 95
    direction = torch.nn.functional.normalize(torch.randn(HEAD_SIZE), dim=0)
    request.keys[position] = 20 * direction
    request.values[position] = 7.0
    request.queries[position:] += 20 * direction  # all that follow look for it, and alike
    request.define()
    left_window = range(position + METHOD.n_local + 1, 130)
    assert "reused" in {request.rows[p][1] for p in left_window}
    server.start(request)
    server.step((request, position + 1))
    for later in range(position + 1, 130):
        found = server.step((request, 1))
        torch.testing.assert_close(found, torch.full_like(found, 7.0), msg=f"lost at {later}")
