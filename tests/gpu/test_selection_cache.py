"""Steps with the Selection Cache are the definition, token after token: eager and as a graph replays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_step import groups_of_rows, on_device, rotation_of
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import CONFIG, HEAD_SIZE, SCALE, best, paged_step, turned
from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.rows import RowGroup, graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method

METHOD = replace(CONFIG, similarity_threshold=0.9, refresh_interval=5)
CAPACITY, MAX_LEN, HEADS, KV_HEADS = 4, 256, 6, 2
KINDS = ("reselected", "reused", "dense")
COUNTED = ("reselected", "reused", "shared", "dense", "attended", "context")


@dataclass
class Text:
    """Everything that a request will ever have in its cache, and what it asks with at each position."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor


@dataclass
class Running:
    """A request as a server sees it, and beside it what the definition remembers of it."""

    text: int
    seat: int
    owner: int
    prompt_len: int
    top_k: int = METHOD.top_k
    last: tuple[torch.Tensor, list[int], int] | None = None
    kinds: dict[int, str] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)

    def visible(self, text: Text, position: int, method: Method) -> tuple[str, list[int]]:
        """What became of a chunk of one at the position, and the tokens that it attends to."""
        query, end = text.queries[position].float(), position - method.n_local
        generated = position >= self.prompt_len
        short = generated and position + 1 <= method.min_context
        if short or end - method.n_init <= self.top_k:
            return "dense", [*range(position + 1)]
        if self.last is not None and generated and method.reuses_selections:
            stored, selected, stored_end = self.last
            heads = (x.view(KV_HEADS, -1) for x in (query, stored))
            cosine = torch.cosine_similarity(*heads, dim=1).min()
            if (
                cosine >= method.similarity_threshold
                and end - stored_end <= method.refresh_interval
            ):
                return "reused", [*selected, *range(stored_end, position + 1)]
        keys = text.keys[method.n_init : end].repeat_interleave(HEADS // KV_HEADS, dim=1)
        asking = query
        if method.reassigns_positions:
            asking = turned(query[None], [method.n_local])[0]
        votes = (torch.einsum("hd,nhd->hn", asking, keys) * SCALE).softmax(-1).sum(0)
        chosen = (method.n_init + index for index in best(votes, self.top_k))
        selected = [*range(method.n_init), *chosen]
        if generated:
            self.last = query, selected, end
        return "reselected", [*selected, *range(end, position + 1)]


class Server:
    """A layer with its caches, a few texts, and steps over whichever requests are running.

    Args:
        together: the processes that vote together, of which this one is the `rank`-th.
        layer: another one has other keys, values and queries in the same KV slots.
    """

    def __init__(
        self,
        lengths: list[int],
        method: Method = METHOD,
        workspace_bytes: int = 1 << 20,
        together: HeadGroup | None = None,
        rank: int = 0,
        layer: int = 0,
    ) -> None:
        ranks = together.size if together else 1
        heads, kv_heads = HEADS // ranks, KV_HEADS // ranks
        self.own_heads = slice(rank * heads, (rank + 1) * heads)
        _, kv_cache, self.block_table = paged_step(
            [(0, length, length) for length in lengths], HEADS, KV_HEADS, torch.float32
        )
        self.method = method
        kv_cache = kv_cache.roll(layer, dims=-1)
        self.texts = [
            Text(*cached_tokens(kv_cache, line, length), correlated_queries(length, seed))
            for seed, (line, length) in enumerate(
                zip(self.block_table, lengths, strict=True), start=10 * layer
            )
        ]
        device = torch.device(DEVICE)
        self.limits = StepLimits(
            method,
            heads,
            kv_heads,
            MAX_LEN,
            workspace_bytes,
            full_attention=not method.reassigns_positions,
            max_tokens=MAX_LEN,
            graph_rows=8,
        )
        self.counters = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        self.workspace = Workspace(self.limits, HEAD_SIZE, device, self.counters, heads=together)
        state = SelectionCacheState.allocate(
            CAPACITY, method.selection_size, HEADS, HEAD_SIZE, torch.float32, device
        )
        own = kv_cache[:, rank * kv_heads : (rank + 1) * kv_heads]
        pages = own.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
        self.cache = LayerCache(
            pages.to(DEVICE),
            selections=state if method.reuses_selections else None,
            rotation=rotation_of(method),
        )
        self.attention: RowAttention = PagedFlashAttention(FlashAttentionModel(3))
        if method.reassigns_positions:
            width = method.max_attended
            buffer = GatherBuffer(kv_heads, HEAD_SIZE, torch.float32, width, device)
            self.attention = GatheredFlashAttention(FlashAttentionModel(2), 2, buffer)
        self.expected = Counter[str]()

    def groups(
        self,
        parts: list[tuple[Running, int, int]],
        graph: Graph | None = None,
        rejected: int = 0,
    ) -> list[RowGroup]:
        """The host takes every context for so many tokens longer: it has not heard of rejected drafts."""
        padding = graph.num_tokens // graph.queries - len(parts) if graph else 0
        lens = [end - first for _, first, end in parts] + [0] * padding
        ends = np.array([end + rejected for _, _, end in parts] + [0] * padding, np.int32)
        real = np.append(ends[: len(parts)] - rejected, ends[len(parts) :])
        batch = BatchRequests.without_seats(ends, self.method.top_k)
        for seq, (request, _, _) in enumerate(parts):
            batch.seats[seq], batch.owners[seq] = request.seat, request.owner
            batch.prompt_lens[seq], batch.top_k[seq] = request.prompt_len, request.top_k
        plan = SelectionPlan.build(np.cumsum([0, *lens]).astype(np.int32), ends, batch, self.method)
        if graph is None:
            return step_rows(plan, ends, on_device(real), self.limits)
        return graph_rows(
            plan,
            ends,
            on_device(real),
            self.limits,
            graph.buffers,
            graph.num_tokens,
            graph.queries,
        )

    def run(self, groups: list[RowGroup], parts: list[tuple[Running, int, int]], tokens: int):
        query = torch.zeros(tokens, HEADS, HEAD_SIZE)
        asked = [self.texts[request.text].queries[first:end] for request, first, end in parts]
        query[: sum(map(len, asked))] = torch.cat(asked)
        query = query[:, self.own_heads]
        blocks = torch.zeros(max(tokens, len(parts)), self.block_table.shape[1], dtype=torch.int32)
        for seq, (request, _, _) in enumerate(parts):
            blocks[seq] = self.block_table[request.text]
        out = torch.full_like(query, float("nan")).to(DEVICE)
        GpuStep(groups, blocks.to(DEVICE)).run_layer(
            query.to(DEVICE), self.cache, SCALE, self.workspace, self.attention, out
        )
        return out.cpu()

    def step(self, parts: list[tuple[Running, int, int]], graph: Graph | None = None) -> None:
        """Run (request, first position, end) and compare with the definition."""
        groups = self.groups(parts, graph)
        tokens = sum(end - first for _, first, end in parts)
        if graph is not None:
            groups, tokens = graph.captured, graph.num_tokens
        actual = self.run(groups, parts, tokens)
        expected = [
            self.defined(request, position)
            for request, first, end in parts
            for position in range(first, end)
        ]
        torch.testing.assert_close(
            actual[: len(expected)], torch.stack(expected)[:, self.own_heads], rtol=2e-4, atol=2e-5
        )
        assert self.counters.tolist() == [self.expected[name] for name in COUNTED]

    def defined(self, request: Running, position: int) -> torch.Tensor:
        text = self.texts[request.text]
        kind, visible = request.visible(text, position, self.method)
        request.seen = visible
        request.kinds[position] = kind
        self.expected.update({kind: 1, "attended": len(visible), "context": position + 1})
        return self.attended(text, position, visible)

    def attended(self, text: Text, position: int, visible: list[int]) -> torch.Tensor:
        """What the query at the position finds in the visible tokens."""
        keys, values = (
            x[visible].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (text.keys, text.values)
        )
        query = text.queries[position]
        if self.method.reassigns_positions:
            keys = turned(keys, range(len(visible)))
            query = turned(query[None], [len(visible) - 1])[0]
        weights = (torch.einsum("hd,nhd->hn", query, keys) * SCALE).softmax(-1)
        return torch.einsum("hn,nhd->hd", weights, values)


class Graph:
    """A step of as many rows as it was captured for: its tensors are fixed, then only rewritten."""

    def __init__(self, server: Server, num_tokens: int, queries: int = 1) -> None:
        self.num_tokens, self.queries = num_tokens, queries
        self.buffers = RowBuffers(num_tokens, torch.device(DEVICE))
        nobody = [(Running(0, -1, 0, queries), 0, queries) for _ in range(num_tokens // queries)]
        self.captured = server.groups(nobody, self)
        server.run(self.captured, nobody, num_tokens)
        assert not server.counters.any()


def cached_tokens(kv_cache: torch.Tensor, line: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Keys and values [length, Hkv, D] of one request."""
    pages = kv_cache[line.long()]  # [W, Hkv, 2, block, D]
    return [
        pages[:, :, kind].transpose(1, 2).reshape(-1, KV_HEADS, HEAD_SIZE)[:length]
        for kind in (0, 1)
    ]


def correlated_queries(length: int, seed: int) -> torch.Tensor:
    """Queries that resemble those before them most of the time, as a model's do."""
    generator = torch.Generator().manual_seed(seed + 100)
    kinds = torch.randn(length, HEADS, HEAD_SIZE, generator=generator)
    jumps = torch.rand(length, generator=generator) < 0.2
    noise = torch.randn(length, HEADS, HEAD_SIZE, generator=generator)
    return kinds[jumps.cumsum(0)] + 0.2 * noise


def decode(server: Server, running: list[Running], ends: list[int], steps: int, graph=None) -> None:
    for step in range(steps):
        server.step(
            [(r, end + step, end + step + 1) for r, end in zip(running, ends, strict=True)], graph
        )


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("rows", [512, 2], ids=["one group", "several groups"])
def test_decoding_reuses_and_selects_as_the_definition_does(captured, rows, monkeypatch):
    server = Server([200, 150, 90])
    groups_of_rows(monkeypatch, server.limits, rows)
    graph = Graph(server, 5) if captured else None
    running = [Running(0, 2, 1, 100), Running(1, 0, 2, 100), Running(2, 3, 3, 40)]
    decode(server, running, [100, 120, 40], 20, graph)
    assert all(server.expected[kind] >= 5 for kind in KINDS)
    kinds = [[r.kinds[p] for p in sorted(r.kinds)] for r in running]
    assert kinds[0] != kinds[1]
    assert {*kinds[2]} == {*KINDS}, "a request that grows out of being dense"


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
def test_a_reused_selection_gets_positions_anew_with_every_token(captured):
    server = Server([150, 90], replace(METHOD, positions="reassigned"))
    graph = Graph(server, 3) if captured else None
    running = [Running(0, 2, 1, 100), Running(1, 3, 3, 40)]
    decode(server, running, [100, 42], 10, graph)
    assert all(server.expected[kind] >= 3 for kind in KINDS)


def test_a_row_that_reuses_a_selection_is_neither_scored_nor_voted_on_nor_selected():
    server = Server([160])
    text, request = server.texts[0], Running(0, 0, 1, 100)
    text.queries[101] = text.queries[100]
    decode(server, [request], [100], 1)
    (group,) = server.groups([(request, 101, 102)])
    step = GpuStep([group], server.block_table.to(DEVICE))
    query = text.queries[101:102].to(DEVICE)
    server.workspace.scores.fill_(float("nan"))
    decision = step.decide(group, query, server.cache, server.workspace)
    assert decision is not None, "decided in a launch of its own"
    step.score(group, query, server.cache, SCALE, server.workspace, decision)
    step.vote(group, server.cache, SCALE, server.workspace)
    apart = replace(group, single_rows=False)  # as a request with several rows is finished
    step.build_table(apart, server.cache, server.workspace)
    assert server.workspace.scores.isnan().all()
    assert server.workspace.lengths[0] == 0
    step.finish(apart, server.cache, server.workspace)
    length = METHOD.n_init + METHOD.top_k + METHOD.n_local + 2
    assert server.workspace.lengths[0] == length
    slots = server.workspace.slots[:length].clone()
    server.workspace.slots.zero_()
    server.workspace.lengths.zero_()
    step.build_table(group, server.cache, server.workspace, decision)
    step.finish(group, server.cache, server.workspace)
    assert server.workspace.lengths[0] == length
    assert torch.equal(server.workspace.slots[:length], slots)


def test_without_a_cache_everything_selects_and_is_counted():
    server = Server([150, 150], replace(METHOD, similarity_threshold=1))
    decode(server, [Running(0, 0, 1, 100), Running(1, 1, 2, 100)], [100, 120], 3)
    assert server.expected["reselected"] == 6


def test_the_end_of_a_prompt_selects_for_itself_and_is_not_remembered():
    server = Server([160])
    request = Running(0, 1, 1, prompt_len=103)
    server.step([(request, 100, 103)])
    assert {*request.kinds.values()} == {"reselected"}
    assert server.cache.selections.owner.tolist() == [0] * CAPACITY
    decode(server, [request], [103], 6)
    assert request.kinds[103] == "reselected"
    assert "reused" in request.kinds.values()


def test_a_seat_that_is_given_away_tells_nothing_of_its_last_request():
    server = Server([160, 160])
    # The second asks what the first asked, at the same positions: only its owner is another.
    server.texts[1].queries = server.texts[0].queries
    first, second = Running(0, 2, 1, 100), Running(1, 2, 2, 100)
    decode(server, [first], [100], 2)
    server.texts[0].queries[102:] = server.texts[0].queries[101]
    decode(server, [first], [102], 1)
    assert first.kinds[102] == "reused"
    decode(server, [second], [103], 1)
    assert second.kinds[103] == "reselected"


@pytest.mark.parametrize("workspace_bytes", [1 << 20, 12000], ids=["one pass", "several groups"])
def test_what_is_computed_again_after_a_preemption_is_decided_as_the_first_time(workspace_bytes):
    server = Server([200, 150], workspace_bytes=workspace_bytes)
    before, other = Running(0, 2, 1, 90), Running(1, 1, 2, 100)
    decode(server, [before, other], [90, 110], 16)
    again = Running(0, 0, 3, 90)
    server.step([(again, 90, 101), (other, 126, 127)])
    server.step([(other, 127, 128), (again, 101, 106)])
    assert again.kinds == {p: before.kinds[p] for p in range(90, 106)}
    assert {"reselected", "reused"} <= {*again.kinds.values()}
    decode(server, [again, other], [106, 128], 3)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
def test_every_request_has_its_own_top_k_and_may_switch_selection_off(captured):
    server = Server([200, 200, 200])
    graph = Graph(server, 4) if captured else None
    running = [
        Running(0, 0, 1, 150, top_k=7),
        Running(1, 1, 2, 150, top_k=FULL_ATTENTION),
        Running(2, 2, 3, 150),
    ]
    decode(server, running, [150, 160, 150], 8, graph)
    assert {*running[1].kinds.values()} == {"dense"}
    assert all("reused" in running[i].kinds.values() for i in (0, 2))


def test_a_whole_prompt_with_selection_off_is_one_row_as_long_as_its_context():
    server = Server([200, 200])
    off, on = Running(0, 0, 1, 200, top_k=FULL_ATTENTION), Running(1, 1, 2, 100)
    groups = server.groups([(off, 0, 200), (on, 110, 111)])
    assert [group.query_len.tolist() for group in groups] == [[200], [1]]
    assert groups[0].max_length == 200 > METHOD.max_attended
    server.expected.update(dense=1)
    parts = [(off, 0, 200), (on, 110, 111)]
    actual = server.run(groups, parts, 201)
    expected = [server.defined(r, p) for r, first, end in parts for p in range(first, end)]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=2e-4, atol=2e-5)
    # A row counts once, its queries' tokens each.
    server.expected.update(dense=-200)
    assert server.counters.tolist() == [server.expected[name] for name in COUNTED]


def test_a_long_context_has_few_lines_of_the_table():
    limits = StepLimits(METHOD, 28, 4, 1 << 20, 1 << 30, full_attention=True)
    assert (limits.table_width, limits.table_rows) == (1 << 20, 32)
    gathered = replace(limits, full_attention=False)
    assert (gathered.table_width, gathered.table_rows) == (METHOD.max_attended, 512)
    huge = replace(limits, max_model_len=1 << 25, workspace_bytes=6 << 30)
    assert huge.table_rows == 1
