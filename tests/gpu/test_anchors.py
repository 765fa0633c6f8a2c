"""Layers that follow an anchor attend to what it selected, as the definition says, in every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.test_selection_cache import COUNTED, KINDS, METHOD, Graph, Running, Server
from tests.gpu.test_step import groups_of_rows
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method

SHARING = replace(METHOD, anchor_layers=2)
EVERY_SECOND = (1, None, 1, None)
Part = tuple[list[Running], int, int]  # what each layer remembers of a request, first position, end


class Layers:
    """Layers that share a workspace, and steps over all of them.

    Args:
        followers: how many layers follow each; None for a layer that follows.
    """

    def __init__(
        self, lengths: list[int], method: Method = SHARING, followers=EVERY_SECOND, **options
    ) -> None:
        self.servers = [
            Server(lengths, method, layer=layer, **options) for layer in range(len(followers))
        ]
        self.first = self.servers[0]
        for server, number in zip(self.servers, followers, strict=True):
            server.workspace, server.expected = self.first.workspace, self.first.expected
            server.cache = replace(
                server.cache,
                follows=number is None,
                followers=number or 0,
                selections=None if number is None else server.cache.selections,
            )

    def request(self, *arguments, **options) -> list[Running]:
        return [Running(*arguments, **options) for _ in self.servers]

    def groups(self, parts: list[Part], graph: Graph | None = None, rejected: int = 0):
        return self.first.groups([(r[0], *span) for r, *span in parts], graph, rejected)

    def step(self, parts: list[Part], graph: Graph | None = None, rejected: int = 0):
        """Run every layer and compare it with the definition; returns the groups."""
        groups = self.groups(parts, graph, rejected)
        tokens = sum(end - first for _, first, end in parts)
        if graph is not None:
            groups, tokens = graph.captured, graph.num_tokens
        left: dict[tuple[int, int], list[int]] = {}  # by the anchor, for each request and position
        for layer, server in enumerate(self.servers):
            own = [(r[layer], *span) for r, *span in parts]
            actual = server.run(groups, own, tokens)
            expected = [
                self.defined(server, request, position, left, number)
                for number, (request, first, end) in enumerate(own)
                for position in range(first, end)
            ]
            torch.testing.assert_close(
                actual[: len(expected)],
                torch.stack(expected)[:, server.own_heads],
                rtol=2e-4,
                atol=2e-5,
            )
        counted = self.first.workspace.counters.tolist()
        assert counted == [self.first.expected[name] for name in COUNTED]
        return groups

    def defined(self, server: Server, request: Running, position: int, left, number: int):
        if not (server.cache.follows and (number, position) in left):
            out = server.defined(request, position)
            if not server.cache.follows:
                left.pop((number, position), None)
                if position >= request.prompt_len and request.kinds[position] != "dense":
                    left[number, position] = request.seen
            return out
        visible = left[number, position]
        request.kinds[position] = "shared"
        server.expected.update(shared=1, attended=len(visible), context=position + 1)
        return server.attended(server.texts[request.text], position, visible)


def decode(layers: Layers, running: list, ends: list[int], steps: int, graph=None, **options):
    for step in range(steps):
        parts = [(r, end + step, end + step + 1) for r, end in zip(running, ends, strict=True)]
        groups = layers.step(parts, graph, **options)
    return groups


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("rows", [512, 2], ids=["one group", "several groups"])
def test_decoding_layers_attend_to_what_the_anchor_below_selected_or_reused(
    captured, rows, monkeypatch
):
    layers = Layers([250, 150, 90])
    groups_of_rows(monkeypatch, layers.first.limits, rows)
    graph = Graph(layers.first, 5) if captured else None
    running = [
        layers.request(0, 2, 1, 100),
        layers.request(1, 0, 2, 100),
        layers.request(2, 3, 3, 40),
    ]
    groups = decode(layers, running, [234, 120, 44], 4, graph)
    assert (len(groups) > 1) == (rows == 2)
    assert all(layers.first.expected[kind] >= 4 for kind in (*KINDS, "shared"))
    assert running[0][1].kinds[235] == "shared"


@pytest.mark.parametrize(
    "changed",
    [{"similarity_threshold": 1.0}, {"positions": "reassigned"}],
    ids=["no Selection Cache", "reassigned"],
)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
def test_layers_follow_whatever_the_other_settings_are(captured, changed):
    layers = Layers([150, 90], replace(SHARING, **changed), followers=(2, None, None))
    graph = Graph(layers.first, 3) if captured else None
    decode(layers, [layers.request(0, 2, 1, 100), layers.request(1, 3, 3, 40)], [120, 44], 3, graph)
    assert layers.first.expected["shared"] >= 6


def test_the_end_of_a_prompt_selects_in_every_layer_between_tokens_that_follow():
    layers = Layers([200, 150, 160, 200])
    generating, prompt = layers.request(0, 2, 1, 100), layers.request(1, 0, 2, 123)
    dense, off = layers.request(2, 1, 3, 30), layers.request(3, 3, 4, 150, top_k=FULL_ATTENTION)
    # One that was preempted: a step computes several of its generated tokens again.
    preempted = layers.request(3, 3, 5, 140)
    groups = layers.step(
        [(dense, 40, 41), (generating, 110, 111), (prompt, 120, 123), (preempted, 150, 152)]
    )
    # A dense token stands among either.
    found = [(group.first, group.num_rows, group.follows) for group in groups]
    assert found == [(0, 2, True), (2, 3, False), (5, 2, True)]
    assert {r.kinds[122] for r in prompt} == {"reselected"}
    assert generating[1].kinds[110] == "shared"
    # A request without selection is longer than the lines that are kept.
    groups = layers.step([(generating, 111, 112), (off, 180, 181)])
    assert [group.follows for group in groups] == [True, False]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("rejected", [0, 2])
def test_drafts_of_a_request_follow_each_its_own_selection_and_are_dense_up_to_min_context(
    captured, rejected
):
    layers = Layers([200, 150], replace(SHARING, min_context=102), followers=(1, None))
    graph = Graph(layers.first, 6, queries=3) if captured else None
    first, second = layers.request(0, 2, 1, 90), layers.request(1, 0, 2, 100)
    for end in (101, 102, 104):  # the host takes some contexts for longer than `min_context`
        layers.step([(first, end - 3, end), (second, end + 20, end + 23)], graph, rejected)
    kinds = first[1].kinds
    assert {kinds[p] for p in range(98, 102)} == {"dense"}
    assert {kinds[p] for p in range(102, 104)} == {"shared"}
