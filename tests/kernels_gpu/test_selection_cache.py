"""The Triton kernels of the Selection Cache do what the definition says, row by row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch

from tests.kernels_gpu.cases import DEVICE, DTYPES, int32
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.selection_cache import gpu, reference
from vllm_tokenselect.kernels.selection_cache.gpu_decide import Decision, decide_rows
from vllm_tokenselect.kernels.selection_cache.gpu_rows import RowArrays
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.settings import FULL_ATTENTION

BLOCK_SIZE, N_INIT, N_LOCAL, TOP_K = 16, 19, 40, 600  # a line of two pieces
THRESHOLD, REFRESH = 0.9, 5
KV_HEADS = 1
FOLLOWERS = 2
UNTOUCHED = -7


@dataclass
class Rows:
    """Rows of one group on the device; `chains` are (first row, number of rows)."""

    query: torch.Tensor
    query_start: torch.Tensor
    query_len: torch.Tensor
    seat: torch.Tensor
    owner: torch.Tensor
    caches: torch.Tensor
    candidate_end: torch.Tensor
    top_k: torch.Tensor
    row_seq: torch.Tensor
    chains: torch.Tensor

    @property
    def context_end(self) -> torch.Tensor:
        return (self.candidate_end + N_LOCAL + self.query_len) * (self.query_len > 0)

    @property
    def sparse(self) -> torch.Tensor:
        return self.candidate_end - N_INIT > self.top_k

    def arrays(self, scored_end, table_end, reused_end) -> RowArrays:
        return RowArrays(
            row_seq=self.row_seq,
            query_len=self.query_len,
            top_k=self.top_k,
            seat=self.seat,
            cached_seat=torch.where(self.caches, self.seat, -1),
            owner=self.owner,
            candidate_end=self.candidate_end,
            context_end=self.context_end,
            scored_end=scored_end,
            table_end=table_end,
            reused_end=reused_end,
            chains=self.chains,
        )

    def decision(self, arrays: RowArrays, state: SelectionCacheState) -> Decision:
        return Decision(
            query=self.query,
            query_start=self.query_start,
            num_kv_heads=KV_HEADS,
            rows=arrays,
            n_init=N_INIT,
            threshold=THRESHOLD,
            refresh_interval=REFRESH,
            state=state,
        )


@dataclass
class Outcome:
    """What a step leaves behind."""

    scored_end: torch.Tensor
    table_end: torch.Tensor
    reused_end: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    counters: torch.Tensor
    state: SelectionCacheState


def rows_of(
    chains: list[tuple[int, int, list[int]]],
    query: torch.Tensor,
    top_k: int = TOP_K,
    padding: int = 0,
    empty_chains: int = 0,
) -> Rows:
    """Chains of (seat, owner, candidate ends), one query a row, behind them padded rows."""
    ends = [end for _, _, run in chains for end in run]
    per_row = [(seq, seat, owner) for seq, (seat, owner, run) in enumerate(chains) for _ in run]
    table, first = [], 0
    for _, _, run in chains:
        table.append([first, len(run)])
        first += len(run)
    rows = range(first + padding)
    real = [row < first for row in rows]
    return Rows(
        query=query,
        query_start=int32(*[min(row, first - 1) for row in rows]),
        query_len=int32(*real),
        seat=int32(*[seat for _, seat, _ in per_row], *[-1] * padding),
        owner=int32(*[owner for _, _, owner in per_row], *[0] * padding),
        caches=torch.tensor(real, device=DEVICE),
        candidate_end=int32(*ends, *[-N_LOCAL] * padding),
        top_k=int32(*[top_k] * first, *[0] * padding),
        row_seq=int32(*[seq for seq, _, _ in per_row], *[0] * padding),
        chains=int32(*[n for line in table for n in line], *[0] * 2 * empty_chains).view(-1, 2),
    )


def new_state(query: torch.Tensor, capacity: int = 4) -> SelectionCacheState:
    state = SelectionCacheState.allocate(
        capacity, N_INIT + TOP_K, *query.shape[1:], query.dtype, DEVICE
    )
    state.query.fill_(float("nan"))
    state.selected.fill_(UNTOUCHED)
    state.candidate_end.fill_(10**9)
    return state


def copy_of(state: SelectionCacheState) -> SelectionCacheState:
    return SelectionCacheState(*(getattr(state, field.name).clone() for field in fields(state)))


def built_table(
    rows: Rows, table_end: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel that builds the table leaves, as far as it matters here."""
    generator = torch.Generator().manual_seed(seed)
    width = N_INIT + TOP_K + N_LOCAL + REFRESH + 50
    slots = torch.randint(1 << 20, (len(table_end), width), generator=generator).to(torch.int32)
    lengths = torch.where(
        rows.sparse, N_INIT + rows.top_k + rows.context_end - rows.candidate_end, rows.context_end
    )
    return slots.to(DEVICE), torch.where(table_end > 0, lengths, 0).to(torch.int32)


def block_table() -> torch.Tensor:
    return torch.randperm(6 * 200, device=DEVICE).view(6, 200).to(torch.int32)


def decided(rows: Rows, takes_part: torch.Tensor, state: SelectionCacheState) -> torch.Tensor:
    """By definition, where the selections end that rows reuse; the others are remembered in the state."""
    return reference.decide(
        query=rows.query,
        num_kv_heads=KV_HEADS,
        query_start=rows.query_start,
        caches=takes_part,
        seat=rows.seat,
        owner=rows.owner,
        candidate_ends=rows.candidate_end,
        threshold=THRESHOLD,
        refresh_interval=REFRESH,
        state=state,
    )


def finish(rows: Rows, takes_part, reused_end, blocks, state, slots, lengths) -> None:
    """By definition, complete a table by the rows that reuse."""
    reference.finish(
        reused_ends=reused_end,
        caches=takes_part,
        seat=rows.seat,
        block_table=blocks,
        row_seq=rows.row_seq,
        n_init=N_INIT,
        top_k=rows.top_k,
        context_ends=rows.context_end,
        block_size=BLOCK_SIZE,
        state=state,
        slots=slots,
        lengths=lengths,
    )


def counters_of(rows: Rows, selects, reused_end, lengths) -> torch.Tensor:
    """By definition, counters that were not zero, and what the rows add to them."""
    counters = torch.arange(len(Counter), device=DEVICE)
    reference.count_rows(
        seat=rows.seat,
        query_len=rows.query_len,
        selects=selects,
        reused_ends=reused_end,
        context_ends=rows.context_end,
        lengths=lengths,
        counters=counters,
        followers=FOLLOWERS,
    )
    return counters


def step_of_reference(rows: Rows, state: SelectionCacheState, blocks, seed=0) -> Outcome:
    state = copy_of(state)
    takes_part = rows.caches & rows.sparse
    reused_end = decided(rows, takes_part, state)
    reuses = reused_end != reference.SELECTS
    selects = rows.sparse & ~reuses
    table_end = torch.where(reuses, 0, rows.context_end)
    slots, lengths = built_table(rows, table_end, seed)
    finish(rows, takes_part, reused_end, blocks, state, slots, lengths)
    counters = counters_of(rows, selects, reused_end, lengths)
    scored_end = torch.where(selects, rows.candidate_end, N_INIT)
    return Outcome(scored_end, table_end, reused_end, slots, lengths, counters, state)


def step_of_kernels(rows: Rows, state: SelectionCacheState, blocks, seed=0) -> Outcome:
    state = copy_of(state)
    # As rows are sent: every row selects that has candidates enough.
    scored_end = torch.where(rows.sparse, rows.candidate_end, N_INIT)
    table_end, reused_end = rows.context_end.clone(), torch.full_like(scored_end, -1)
    arrays = rows.arrays(scored_end, table_end, reused_end)
    decide_rows(rows.decision(arrays, state))
    slots, lengths = built_table(rows, table_end, seed)
    counters = torch.arange(len(Counter), device=DEVICE)
    gpu.finish_rows(
        rows=arrays,
        block_table=blocks,
        n_init=N_INIT,
        block_size=BLOCK_SIZE,
        state=state,
        table=SparseBlockTable(slots, lengths),
        counters=counters,
        followers=FOLLOWERS,
    )
    return Outcome(scored_end, table_end, reused_end, slots, lengths, counters, state)


def assert_same_step(rows: Rows, state: SelectionCacheState, seed: int = 0) -> Outcome:
    blocks = block_table()
    expected = step_of_reference(rows, state, blocks, seed)
    actual = step_of_kernels(rows, state, blocks, seed)
    for name in ("reused_end", "scored_end", "table_end", "lengths", "slots", "counters"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for field in fields(SelectionCacheState):
        torch.testing.assert_close(
            getattr(actual.state, field.name),
            getattr(expected.state, field.name),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=field.name,
        )
    return actual


def queries(like: list[int], heads: int = 6, head_size: int = 32, dtype=torch.float32, seed=0):
    """[T, heads, D]; queries of one number resemble each other, those of different ones do not."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(10, heads, head_size, generator=generator)
    noise = torch.randn(len(like), heads, head_size, generator=generator)
    return (kinds[like] + 0.1 * noise).to(dtype).to(DEVICE)


def counted(counters: torch.Tensor) -> list[int]:
    """What was added to counters that were not zero."""
    return (counters - torch.arange(len(Counter), device=DEVICE)).tolist()


def decisions(outcome: Outcome) -> list[bool]:
    return (outcome.reused_end != -1).tolist()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "head_size"), [(1, 64), (3, 37), (8, 128), (9, 64), (28, 128), (8, 512)], ids=str
)
def test_chains_of_one_reuse_what_resembles(heads: int, head_size: int, dtype: str):
    query = queries([0, 1, 2, 3], heads, head_size, DTYPES[dtype])
    chains = [(2, 11, [700]), (0, 12, [1000]), (3, 13, [690]), (1, 14, [2000])]
    first = assert_same_step(rows_of(chains, query), new_state(query))
    assert decisions(first) == [False] * 4
    query = queries([0, 9, 2, 3], heads, head_size, DTYPES[dtype])  # the second is another
    chains = [(seat, owner, [end + 1]) for seat, owner, (end,) in chains]
    second = assert_same_step(rows_of(chains, query), first.state, seed=1)
    assert decisions(second) == [True, False, True, True]
    third = assert_same_step(rows_of(chains, query), second.state, seed=2)
    assert decisions(third) == [True] * 4


def test_a_chain_of_many_is_decided_row_by_row_and_goes_on_through_the_state():
    like = [0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    expected = [
        False,
        True,
        False,
        True,
        True,
        False,
        False,
        *[True] * 5,
        False,
        *[True] * 3,
        False,
    ]
    ends = [*range(700, 700 + len(like))]
    query = queries(like)
    whole = assert_same_step(rows_of([(1, 5, ends)], query), new_state(query))
    assert decisions(whole) == expected
    found, state, last = [], new_state(query), None
    for cut in (slice(0, 1), slice(1, 8), slice(8, 11), slice(11, 17)):
        last = assert_same_step(rows_of([(1, 5, ends[cut])], query[cut]), state)
        found, state = found + decisions(last), last.state
    assert found == expected
    assert torch.equal(state.query, whole.state.query) or state.query.isnan().any()
    assert torch.equal(state.candidate_end, whole.state.candidate_end)


@pytest.mark.parametrize(("moved", "reused"), [(0, True), (REFRESH, True), (REFRESH + 1, False)])
def test_a_selection_is_reused_up_to_the_refresh_interval(moved: int, reused: bool):
    query = queries([0])
    first = assert_same_step(rows_of([(0, 1, [800])], query), new_state(query))
    second = assert_same_step(rows_of([(0, 1, [800 + moved])], query), first.state)
    assert decisions(second) == [reused]
    # A reuse does not make the selection younger.
    third = assert_same_step(rows_of([(0, 1, [800 + REFRESH + 1])], query), second.state)
    assert decisions(third) == [not reused]


def test_a_line_of_another_owner_is_never_read():
    query = queries([0])
    first = assert_same_step(rows_of([(2, 7, [800])], query), new_state(query))
    assert decisions(assert_same_step(rows_of([(2, 8, [801])], query), first.state)) == [False]
    assert decisions(assert_same_step(rows_of([(1, 7, [801])], query), first.state)) == [False]
    assert decisions(assert_same_step(rows_of([(2, 7, [801])], query), first.state)) == [True]


def test_a_query_close_to_the_threshold_falls_on_its_side():
    base, across = torch.eye(2, 192).view(2, 6, 32).unbind()
    for cosine, reused in ((THRESHOLD - 1e-4, False), (THRESHOLD + 1e-4, True)):
        turned = 3 * (cosine * base + (1 - cosine**2) ** 0.5 * across)
        query = torch.stack([base, turned]).to(DEVICE)
        outcome = assert_same_step(rows_of([(0, 1, [700, 701])], query), new_state(query))
        assert decisions(outcome) == [False, reused]


@pytest.mark.parametrize(
    ("kv_heads", "reused"), [(1, [False, True]), (2, [False, False]), (3, [False, False])]
)
def test_the_queries_of_every_kv_head_must_resemble(
    kv_heads: int, reused, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(globals(), "KV_HEADS", kv_heads)
    query = queries([0, 0])
    query[1, 5] = -query[1, 5]  # a head of the last KV head's
    query[:, :3] *= 9  # whose part in the whole is small
    outcome = assert_same_step(rows_of([(0, 1, [700, 701])], query), new_state(query))
    assert decisions(outcome) == reused


@pytest.mark.parametrize(("value", "reused"), [(0.0, True), (float("nan"), False)])
def test_queries_without_a_direction(value: float, reused: bool):
    query = torch.full((2, 6, 32), value, device=DEVICE)
    outcome = assert_same_step(rows_of([(0, 1, [700, 701])], query), new_state(query))
    assert decisions(outcome) == [False, reused]


def test_padded_rows_and_chains_without_rows_touch_nothing():
    query = queries([0, 1])
    rows = rows_of([(0, 1, [700]), (3, 2, [900])], query, padding=3, empty_chains=3)
    outcome = assert_same_step(rows, new_state(query))
    assert counted(outcome.counters)[:4] == [
        2,
        0,
        2 * FOLLOWERS,
        0,
    ]
    nobody = rows_of([(0, 1, [700])], query)
    nobody.seat.fill_(-1)
    nobody.caches.fill_(False)
    nobody.chains.zero_()
    outcome = assert_same_step(nobody, outcome.state)
    assert not any(counted(outcome.counters))


def test_a_row_that_the_device_finds_dense_neither_reuses_nor_is_remembered():
    query = queries([0, 0, 0])
    ends = [N_INIT + TOP_K, N_INIT + TOP_K + 1, N_INIT + TOP_K + 2]
    outcome = assert_same_step(rows_of([(0, 1, ends)], query), new_state(query))
    assert decisions(outcome) == [False, False, True]
    assert outcome.scored_end.tolist() == [N_INIT, ends[1], N_INIT]
    assert counted(outcome.counters)[:4] == [
        1,
        1,
        2 * FOLLOWERS,
        1 + FOLLOWERS,
    ]


def test_the_first_rows_of_a_chain_may_be_too_short_to_select():
    query = queries([0, 0, 0])
    rows = rows_of([(0, 1, [700, 701, 702])], query)
    rows.top_k[0] = FULL_ATTENTION
    outcome = assert_same_step(rows, new_state(query))
    assert outcome.scored_end.tolist() == [N_INIT, 701, N_INIT]
    rows.top_k[:] = FULL_ATTENTION
    assert decisions(assert_same_step(rows, outcome.state)) == [False] * 3


@pytest.mark.parametrize("top_k", [1, 493, 494])
def test_a_line_is_as_long_as_the_requests_own_top_k(top_k: int):
    # 493 + 19 is a whole piece.
    query = queries([0, 0, 1, 1, 0])
    outcome = assert_same_step(
        rows_of([(2, 3, [700, 702, 703, 705, 710])], query, top_k), new_state(query)
    )
    assert decisions(outcome) == [False, True, False, True, False]
    assert (outcome.state.selected[2, N_INIT + top_k :] == UNTOUCHED).all()


def test_there_may_be_no_sink(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "N_INIT", 0)
    query = queries([0, 0, 1, 0])
    ends = [TOP_K, TOP_K + 1, TOP_K + 2, TOP_K + 3]
    rows = rows_of([(1, 3, ends)], query, padding=1)
    outcome = assert_same_step(rows, new_state(query))
    assert decisions(outcome) == [False] * 5
    outcome = assert_same_step(rows_of([(1, 3, [ends[-1] + 1])], query[3:]), outcome.state)
    assert decisions(outcome) == [True]


def test_queries_may_be_a_slice_of_the_projection():
    projected = torch.randn(3, 5 * 32, device=DEVICE)
    query = projected[:, : 3 * 32].view(3, 3, 32)
    query[1] = 2 * query[0]
    outcome = assert_same_step(rows_of([(0, 1, [700, 701, 702])], query), new_state(query))
    assert decisions(outcome) == [False, True, False]


def test_counts_are_those_of_the_definition_without_a_cache():
    rows = Rows(
        query=queries([0]),
        query_start=int32(*[0] * 6),
        query_len=int32(512, 1, 8192, 3, 1, 0),
        seat=int32(3, 0, 1, 2, -1, -1),
        owner=int32(*range(6)),
        caches=torch.zeros(6, dtype=torch.bool, device=DEVICE),
        candidate_end=int32(1500, 1900, 1_000_000, -30, 2000, -N_LOCAL),
        top_k=int32(TOP_K, 7, FULL_ATTENTION, TOP_K, TOP_K, 0),
        row_seq=int32(*[0] * 6),
        chains=int32().view(0, 2),
    )
    counters = torch.arange(len(Counter), device=DEVICE)
    scored_end = torch.where(rows.sparse, rows.candidate_end, N_INIT)
    gpu.finish_rows(
        rows=rows.arrays(scored_end, rows.context_end, torch.full_like(scored_end, -1)),
        block_table=block_table(),
        n_init=N_INIT,
        block_size=BLOCK_SIZE,
        state=None,
        table=SparseBlockTable(int32(), int32()),
        counters=counters,
    )
    attended = sum(N_INIT + TOP_K + N_LOCAL + i for i in range(1, 513))
    attended += N_INIT + 7 + N_LOCAL + 1
    start = 1_000_000 + N_LOCAL
    full = sum(range(start + 1, start + 8193))  # more than 32 bits hold
    context = sum(range(1541, 1541 + 512)) + 1941 + full + 11 + 12 + 13
    attended += full + 11 + 12 + 13
    assert counted(counters) == [2, 0, 0, 2, attended, context]
