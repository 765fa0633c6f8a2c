"""Generated tokens select in anchors; the layers that follow attend to what the anchor has selected."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.oracle.step import ReferenceStep, sdpa_attention
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.rows import RowGroup
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.attend.reference import attend_single_queries
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.anchors import choose_anchors, give_roles
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests, Int32
from vllm_tokenselect.method.settings import Method

METHOD = Method(top_k=12, n_init=4, n_local=16, query_chunk=32, tail_queries=3, min_context=60)
BLOCK_SIZE, HEADS, KV_HEADS, HEAD_SIZE, SCALE = 16, 6, 2, 16, 0.25
LAYERS = 6
# First position, end, length of the prompt, top_k: a token with settings of its own, a short context, a
# prompt's last chunk and tail, tokens computed again after a preemption with the tail before them.
STEP = [(110, 111, 70, 12), (150, 151, 90, 5), (55, 56, 40, 12), (64, 90, 90, 12), (87, 95, 90, 9)]
GENERATED = 1 + 1 + 1 + 0 + 5


def int32(*values: int) -> Int32:
    return np.array(values, np.int32)


class AloneInAGroup:
    """A `HeadGroup` of one process, which notes what is exchanged."""

    size, num_kv_heads = 1, KV_HEADS

    def __init__(self) -> None:
        self.calls: list[str] = []

    def gather_heads(self, query: torch.Tensor) -> torch.Tensor:
        self.calls.append("gather")
        return query

    def sum_votes(self, votes: torch.Tensor) -> torch.Tensor:
        self.calls.append("sum")
        return votes


class Model:
    """Layers with keys, values and queries of their own, and the roles that a setting gives them."""

    def __init__(self, step_class, anchor_layers, method=METHOD, workspace=32 << 20, heads=None):
        self.step_class, self.workspace, self.heads = step_class, workspace, heads
        self.method = replace(method, anchor_layers=anchor_layers)
        self.random = torch.Generator().manual_seed(1)
        self.counts = torch.zeros(len(Counter), dtype=torch.int64)
        width = -(-160 // BLOCK_SIZE)
        num_blocks = len(STEP) * width
        blocks = torch.randperm(num_blocks, generator=self.random)
        self.block_table = blocks.view(len(STEP), width).to(torch.int32)
        layers = range(LAYERS)
        roles = give_roles(choose_anchors(anchor_layers, layers), layers)
        self.layers = []
        for role in roles:
            pages = self.randn(num_blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_SIZE)
            cache = LayerCache(pages, follows=role.follows, followers=role.followers)
            if method.reuses_selections and not role.follows:
                cache = replace(cache, selections=self.selections())
            self.layers.append(cache)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def selections(self) -> SelectionCacheState:
        size, device = self.method.selection_size, torch.device("cpu")
        return SelectionCacheState.allocate(
            len(STEP), size, HEADS, HEAD_SIZE, torch.float32, device
        )

    def start(self, step=STEP) -> CpuStep:
        firsts, ends, prompts, top_k = (int32(*values) for values in zip(*step, strict=True))
        seats = np.arange(len(step), dtype=np.int32)
        requests = BatchRequests(seats, seats + 1, prompts, top_k)
        starts = np.cumsum([0, *(ends - firsts)]).astype(np.int32)
        plan = SelectionPlan.build(starts, ends, requests, self.method)
        table = self.block_table[: len(step)]
        arguments = (table, BLOCK_SIZE, HEADS, self.method, self.counts, self.workspace, self.heads)
        return self.step_class.of_plan(plan, *arguments)

    def run(self, step: CpuStep, queries: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of every layer for its queries [T, Hq, D] of [L, T, Hq, D]."""
        outputs = []
        for cache, query in zip(self.layers, queries, strict=True):
            out = torch.full_like(query, float("nan"))
            step.run_layer(query, cache, SCALE, sdpa_attention(cache, 160), out)
            outputs.append(out)
        return outputs

    def queries(self, step=STEP) -> torch.Tensor:
        return self.randn(LAYERS, sum(end - first for first, end, *_ in step), HEADS, HEAD_SIZE)


def table_of(groups: list[RowGroup]) -> list[list[int]]:
    return [
        slots[:length].tolist()
        for group in groups
        for slots, length in zip(group.slots, group.lengths, strict=True)
    ]


@pytest.mark.parametrize("anchor_layers", ["all", 2, (1, 4)], ids=str)
@pytest.mark.parametrize("workspace", [32 << 20, 1], ids=["one group", "a group for each row"])
@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["Selection Cache", "none"])
@pytest.mark.parametrize("together", [False, True], ids=["local", "global"])
def test_both_select_attend_and_count_the_same(anchor_layers, workspace, threshold, together):
    method = replace(METHOD, similarity_threshold=threshold)
    models = [
        Model(step_class, anchor_layers, method, workspace, AloneInAGroup() if together else None)
        for step_class in (CpuStep, ReferenceStep)
    ]
    queries = models[0].queries()
    for _ in range(2):  # the second time, half of the queries resemble those before
        steps = [model.start() for model in models]
        results = [model.run(step, queries) for model, step in zip(models, steps, strict=True)]
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
        assert table_of(steps[0].groups) == table_of(steps[1].groups)
        queries = queries * (1 - 2 * (torch.arange(queries.shape[1]) % 2))[:, None, None]
    assert models[0].counts.tolist() == models[1].counts.tolist()


@pytest.mark.parametrize("workspace", [32 << 20, 1], ids=["one group", "a group for each row"])
def test_a_generated_token_attends_to_the_tokens_of_the_anchor_and_all_others_to_their_own(
    workspace,
):
    model, every_layer = (Model(CpuStep, anchors, workspace=workspace) for anchors in (3, "all"))
    queries = model.queries()
    step = model.start()
    anchor, follower = model.layers[:2]
    attention = sdpa_attention(anchor, 160)
    step.run_layer(queries[0], anchor, SCALE, attention, torch.empty_like(queries[0]))
    left = [
        group._replace(slots=group.slots.copy(), lengths=group.lengths.copy())
        for group in step.groups
    ]
    out = torch.full_like(queries[1], float("nan"))
    step.run_layer(queries[1], follower, SCALE, attention, out)

    expected = every_layer.run(every_layer.start(), queries)[1]
    followed = 0
    for group in left:
        if not group.follows:
            continue
        tokens, slots, lengths = map(
            torch.from_numpy, (group.query_start, group.slots, group.lengths)
        )
        own = torch.empty_like(out)
        attend_single_queries(queries[1], tokens, follower.pages, slots, lengths, SCALE, own)
        assert (expected[tokens] - own[tokens]).abs().max() > 0.1, "the layer would select others"
        expected[tokens] = own[tokens]
        followed += group.num_rows
    assert followed == GENERATED - 1, "all generated tokens but that of the short context"
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("threshold", [0.9, 1.0], ids=["Selection Cache", "none"])
def test_every_row_of_every_layer_is_counted_once(threshold):
    counts = []
    for anchors in (2, "all"):
        model = Model(CpuStep, anchors, replace(METHOD, similarity_threshold=threshold))
        model.run(model.start(), model.queries())
        counts.append(dict(zip(Counter, model.counts.tolist(), strict=True)))
    shared, alone = counts
    moved = (GENERATED - 1) * LAYERS // 2
    assert shared[Counter.SHARED] == moved
    assert shared[Counter.RESELECTED] == alone[Counter.RESELECTED] - moved
    for counter in (Counter.DENSE, Counter.ATTENDED, Counter.CONTEXT):
        assert shared[counter] == alone[counter] > 0


def test_only_anchors_exchange_votes():
    heads = AloneInAGroup()
    model = Model(CpuStep, (0, 4), heads=heads)
    decoding = STEP[:2]
    model.run(model.start(decoding), model.queries(decoding))
    assert heads.calls == ["gather", "sum"] * 2
