"""Rows of one query select and attend in one call as the references do one by one."""

import pytest
import torch

from tests.kernels.cases import (
    SHAPES,
    Case,
    int32,
    make_group,
    make_rotation,
    make_softmax,
    paged_cache,
    run_group,
)
from tests.oracle.step import ReferenceStep
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.rows import RowGroup
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.settings import Method

N_INIT, TOP_K = 5, 20
TOLERANCE = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 1e-2}


METHOD = Method(n_init=N_INIT, top_k=TOP_K)


def rows_of(
    case: Case, query_start, ends, top_k=TOP_K, row_seq=None, selects=True, **caching
) -> RowGroup:
    count = len(ends)
    return make_group(
        query_start=query_start,
        row_seq=torch.arange(count, dtype=torch.int32) if row_seq is None else row_seq,
        top_k=torch.as_tensor(top_k, dtype=torch.int32).expand(count).contiguous(),
        candidate_end=ends,
        slots=torch.arange(count * case.tokens, dtype=torch.int32).view(count, -1) % len(ends),
        lengths=torch.full((count,), 17, dtype=torch.int32),
        selects=selects,
        **caching,
    )


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("rotated", [0, 0.5, 1])
def test_both_fill_the_same_table_and_give_the_same_output(case: Case, selects: bool, rotated):
    kv_cache, block_table = paged_cache(case)
    ends = torch.randint(N_INIT + TOP_K + 1, case.tokens - 1, (case.rows,), dtype=torch.int32)
    top_k = torch.randint(1, TOP_K + 1, (case.rows,))
    tokens = torch.randperm(case.rows + 3, dtype=torch.int32)[: case.rows]  # anywhere in the step
    query = torch.randn(case.rows + 3, case.num_heads, case.head_size).to(case.torch_dtype)
    results = []
    for step in (CpuStep, ReferenceStep):
        rows = rows_of(case, tokens, ends, top_k, selects=selects)
        out = torch.full_like(query, 9.0)
        cache = LayerCache(kv_cache, rotation=make_rotation(case, rotated) if rotated else None)
        run_group(rows, query, cache, block_table, METHOD, out, step_class=step)
        results.append((torch.from_numpy(rows.slots), torch.from_numpy(rows.lengths), out))
    for actual, expected in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(actual, expected)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("step", [CpuStep, ReferenceStep])
def test_sinks_and_caps_change_the_output_and_not_what_is_selected(step):
    case = SHAPES[1]
    kv_cache, block_table = paged_cache(case)
    index, ends = torch.arange(3, dtype=torch.int32), int32(500, 300, 100)
    query = torch.randn(3, case.num_heads, case.head_size).to(case.torch_dtype)
    results = []
    for softmax in ({}, make_softmax(case, "sinks and a cap")):
        rows, out = rows_of(case, index, ends), torch.empty_like(query)
        cache = LayerCache(kv_cache, **softmax)
        run_group(rows, query, cache, block_table, METHOD, out, step_class=step)
        results.append((torch.from_numpy(rows.slots), out))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] - results[1][1]).abs().max() > 0.05


class Cached:
    """Decodes request 0 of a case, step by step or several tokens at once."""

    def __init__(self, step_class, case: Case, threshold=0.9, refresh_interval=8, capacity=3):
        self.step_class, self.case = step_class, case
        self.kv_cache, self.block_table = paged_cache(case)
        self.method = Method(
            n_init=N_INIT,
            top_k=TOP_K,
            similarity_threshold=threshold,
            refresh_interval=refresh_interval,
        )
        self.counts = torch.zeros(len(Counter), dtype=torch.int64)
        self.state = SelectionCacheState.allocate(
            capacity,
            N_INIT + TOP_K,
            case.num_heads,
            case.head_size,
            case.torch_dtype,
            torch.device("cpu"),
        )

    def step(self, queries, ends, slots=1, owners=5, caches=True, top_k=TOP_K):
        """Rows with these queries and ends of candidates; returns (slots, lengths, output)."""
        count = len(ends)

        def each(value, dtype=torch.int32):
            return torch.as_tensor(value, dtype=dtype).expand(count).contiguous()

        seqs = torch.arange(count, dtype=torch.int32) if isinstance(slots, list) else each(0)
        rows = rows_of(
            self.case,
            torch.arange(count, dtype=torch.int32),
            int32(*ends),
            top_k,
            seqs,
            caches=each(caches, torch.bool),
            seat=each(slots),
            owner=each(owners),
        )
        out = torch.empty_like(queries)
        run_group(
            rows,
            queries,
            LayerCache(self.kv_cache, selections=self.state),
            self.block_table,
            self.method,
            out,
            counters=self.counts,
            step_class=self.step_class,
        )
        lines = [rows.slots[r, :length].tolist() for r, length in enumerate(rows.lengths.tolist())]
        return lines, out

    def reselected(self) -> int:
        return int(self.counts[0])


def similar_queries(case: Case, count: int, noise: float) -> torch.Tensor:
    """A random walk: how far two queries are apart grows with the steps between them."""
    generator = torch.Generator().manual_seed(count)
    steps = torch.randn(count, case.num_heads, case.head_size, generator=generator)
    steps[1:] *= noise
    return steps.cumsum(0).to(case.torch_dtype)


ANY = -2.0  # a threshold that every query reaches
CACHED_SHAPES = [case for case in SHAPES if case.tokens > 300]


@pytest.mark.parametrize("case", CACHED_SHAPES, ids=str)
def test_both_reuse_the_same_selections_and_count_the_same(case: Case):
    queries = similar_queries(case, 24, 0.15)
    cached = [Cached(step, case) for step in (CpuStep, ReferenceStep)]
    for index in range(24):
        # Twice a step without a query in between: recomputed tokens come several at a time.
        part = queries[index : index + 1 + index % 2]
        results = [c.step(part, range(200 + index, 200 + index + len(part))) for c in cached]
        assert results[0][0] == results[1][0]
        tolerance = TOLERANCE[case.dtype]
        torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)
    assert cached[0].counts.tolist() == cached[1].counts.tolist()
    assert 1 < cached[0].reselected() < 24, "the test should see both kinds of rows"


CASE = Case(2, 640, 9, 3, 64, 32, "fp32")


def test_a_reused_selection_attends_to_every_token_since_it_was_made():
    cached = Cached(CpuStep, CASE, threshold=ANY)
    (first,), _ = cached.step(similar_queries(CASE, 1, 1), [300])
    (later,), _ = cached.step(-similar_queries(CASE, 1, 1), [306])
    table = cached.block_table[0]
    since = [int(table[p // 32]) * 32 + p % 32 for p in range(300, 307)]
    assert later == first[: N_INIT + TOP_K] + since
    assert cached.counts.tolist() == [1, 1, 0, 0, len(first) + len(later), 301 + 307]


def test_a_selection_is_made_anew_once_more_tokens_than_allowed_have_left_the_local_window():
    cached = Cached(CpuStep, CASE, threshold=ANY, refresh_interval=8)
    query = similar_queries(CASE, 1, 1)
    for end, reselected in ((300, 1), (308, 1), (309, 2), (317, 2), (318, 3)):
        cached.step(query, [end])
        assert cached.reselected() == reselected, end


def turned(query: torch.Tensor, towards: torch.Tensor, angle: float) -> torch.Tensor:
    """Every KV head's part of a query turned by the same angle."""
    start, other = (x.view(CASE.num_kv_heads, -1) for x in (query, towards))
    other = other - (other * start).sum(1, True) / start.square().sum(1, True) * start
    other *= start.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
    angle = torch.tensor(angle)
    return (angle.cos() * start + angle.sin() * other).view_as(query)


@pytest.mark.parametrize("step", [CpuStep, ReferenceStep])
def test_the_query_is_compared_with_that_of_the_last_selection_not_of_the_last_step(step):
    cached = Cached(step, CASE, threshold=0.9)
    start, towards = similar_queries(CASE, 1, 1), torch.randn(1, 9, 64)
    # Each is at a cosine of 0.96 with the one before it, 0.86 with the one before that.
    for angle, reselected in ((0.0, 1), (0.27, 1), (0.54, 2), (0.81, 2), (1.08, 3)):
        cached.step(turned(start, towards, angle), [300])
        assert cached.reselected() == reselected, angle


@pytest.mark.parametrize("step", [CpuStep, ReferenceStep])
@pytest.mark.parametrize("kv_head", [0, 1, 2])
def test_one_kv_head_whose_queries_have_turned_away_is_enough_to_select_anew(step, kv_head):
    cached = Cached(step, CASE, threshold=0.9)
    start = similar_queries(CASE, 1, 1)
    other = start.clone().view(1, 3, 3, 64)
    other[:, kv_head] = turned(start, torch.randn(1, 9, 64), 0.5).view(1, 3, 3, 64)[:, kv_head]
    assert torch.cosine_similarity(start.flatten(), other.flatten(), dim=0) > 0.95
    cached.step(start, [300])
    cached.step(other.view_as(start), [300])
    assert cached.reselected() == 2


def test_another_owner_of_the_slot_never_reads_what_was_kept():
    cached = Cached(CpuStep, CASE, threshold=ANY)
    query = similar_queries(CASE, 1, 1)
    cached.step(query, [300], owners=5)
    cached.step(query, [301], owners=6)
    assert cached.reselected() == 2
    cached.step(query, [302], owners=6)
    assert cached.reselected() == 2


def test_a_row_that_takes_no_part_neither_reads_nor_writes_what_is_kept():
    cached = Cached(CpuStep, CASE, threshold=ANY)
    query = similar_queries(CASE, 1, 1)
    cached.step(query, [300])
    kept = [t.clone() for t in (cached.state.query[1], cached.state.selected[1])]
    (line,), _ = cached.step(-query, [304], caches=False)
    fresh, _ = Cached(CpuStep, CASE).step(-query, [304])
    assert [line] == fresh
    assert torch.equal(cached.state.query[1], kept[0])
    assert torch.equal(cached.state.selected[1], kept[1])
    assert cached.counts.tolist()[: Counter.ATTENDED] == [1, 0, 0, 0]


@pytest.mark.parametrize("step", [CpuStep, ReferenceStep])
def test_several_tokens_at_once_decide_as_one_by_one(step):
    queries = similar_queries(CASE, 20, 0.15)
    by_step, at_once = Cached(step, CASE), Cached(step, CASE)
    lines = [by_step.step(queries[i : i + 1], [300 + i])[0][0] for i in range(20)]
    assert at_once.step(queries, range(300, 320))[0] == lines
    assert 1 < by_step.reselected() < 20
    assert torch.equal(at_once.state.query[1], by_step.state.query[1])


def test_requests_in_one_step_keep_to_their_own_slots_and_top_k():
    case = Case(3, 640, 9, 3, 64, 32, "bf16")
    together = Cached(CpuStep, case, threshold=ANY)
    queries = similar_queries(case, 3, 1)
    slots, owners, top_k = [2, 0, 1], [7, 8, 9], [20, 3, 11]
    first, _ = together.step(queries, [300, 200, 400], slots, owners, top_k=top_k)
    later, _ = together.step(-queries, [301, 201, 401], slots, owners, top_k=top_k)
    for line, before, kept in zip(later, first, top_k, strict=True):
        assert line[: N_INIT + kept] == before[: N_INIT + kept]
        assert len(line) == len(before) + 1 == N_INIT + kept + 2
