"""Rows in the Selection Cache, one of each request, are finished by the kernel that writes their table."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import triton

from tests.kernels_gpu import test_selection_cache as cases
from tests.kernels_gpu.cases import (
    DEVICE,
    columns_for,
    empty_columns,
    int32,
    packed,
    unpacked,
)
from tests.kernels_gpu.test_selection_cache import (
    BLOCK_SIZE,
    FOLLOWERS,
    KV_HEADS,
    N_INIT,
    N_LOCAL,
    TOP_K,
    UNTOUCHED,
    Rows,
)
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.kernels.block_table import gpu_digits
from vllm_tokenselect.kernels.block_table import reference as table_reference
from vllm_tokenselect.kernels.block_table.gpu import TableScratch
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.score.gpu import NUM_PARTS, Scores, score_paged_keys
from vllm_tokenselect.kernels.selection_cache.gpu_decide import Decision, decide_rows
from vllm_tokenselect.kernels.selection_cache.gpu_table import build_finished_table
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.settings import FULL_ATTENTION

DECIDED_BY_SCORES = False


@pytest.fixture(params=["decided apart", "decided by the scores"], autouse=True)
def decide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How `assert_finished` decides."""
    monkeypatch.setitem(globals(), "DECIDED_BY_SCORES", request.param == "decided by the scores")


def assert_finished(rows: Rows, state: SelectionCacheState | None, seed: int = 0):
    """Decide, build and finish with votes of that seed; compare with the definitions.

    Returns:
        reused_end, lengths, what was added to the counters, the state.
    """
    blocks = cases.block_table()
    width = max(int(rows.candidate_end.max()) - N_INIT, 64)
    generator = torch.Generator().manual_seed(seed)
    votes = torch.rand(len(rows.row_seq), width, generator=generator).round(decimals=2).to(DEVICE)
    expected = defined(rows, state, blocks, votes)
    actual = launched(rows, state, blocks, votes)
    for name, own in actual.items():
        torch.testing.assert_close(
            own, expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    changed = None if state is None else cases.copy_of(state)
    for field in () if changed is None else fields(changed):
        getattr(changed, field.name).copy_(actual[field.name])
    counted = cases.counted(actual["counters"])
    return (actual["reused_end"] != -1).tolist(), actual["lengths"], counted, changed


def empty_table(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, longest = len(rows.row_seq), int(rows.context_end.max())
    slots = torch.full((num_rows, longest + 5), UNTOUCHED, dtype=torch.int32, device=DEVICE)
    return slots, int32(*[UNTOUCHED] * num_rows)


def defined(rows, state, blocks, votes) -> dict[str, torch.Tensor]:
    takes_part = rows.caches & rows.sparse & (state is not None)
    reused_end = torch.full_like(rows.candidate_end, -1)
    if state is not None:
        state = cases.copy_of(state)
        reused_end = cases.decided(rows, takes_part, state)
    reuses = reused_end != -1
    selects = rows.sparse & ~reuses
    slots, lengths = empty_table(rows)
    table_reference.build_sparse_block_table(
        votes=votes,
        block_table=blocks,
        row_seq=rows.row_seq,
        n_init=N_INIT,
        top_k=rows.top_k,
        candidate_ends=torch.where(selects, rows.candidate_end, N_INIT),
        context_ends=torch.where(reuses, 0, rows.context_end),
        block_size=BLOCK_SIZE,
        slots=slots,
        lengths=lengths,
    )
    if state is not None:
        cases.finish(rows, takes_part, reused_end, blocks, state, slots, lengths)
    counters = cases.counters_of(rows, selects, reused_end, lengths)
    return outcome(reused_end, slots, lengths, counters, state)


def launched(rows, state, blocks, votes) -> dict[str, torch.Tensor]:
    # As rows are sent: every row selects that has candidates enough.
    scored_end = torch.where(rows.sparse, rows.candidate_end, N_INIT)
    table_end, reused_end = rows.context_end.clone(), torch.full_like(scored_end, -1)
    arrays = rows.arrays(scored_end, table_end, reused_end)
    decision = None
    if state is not None:
        state = cases.copy_of(state)
        decision = rows.decision(arrays, state)
        if DECIDED_BY_SCORES:
            score_and_decide(rows, decision, blocks)
        else:
            decide_rows(decision)
            decision = None
    slots, lengths = empty_table(rows)
    counters = torch.arange(len(Counter), device=DEVICE)
    columns = columns_for([votes.shape[1]] * len(slots))
    build_finished_table(
        votes=packed(votes, columns),
        columns=columns,
        block_table=blocks,
        rows=arrays,
        n_init=N_INIT,
        block_size=BLOCK_SIZE,
        table=SparseBlockTable(slots, lengths),
        scratch=TableScratch(int(columns.starts[-1]), len(slots), DEVICE),
        counted=False,
        state=state,
        counters=counters,
        followers=FOLLOWERS,
        decision=decision,
    )
    return outcome(reused_end, slots, lengths, counters, state)


def score_and_decide(rows: Rows, decision: Decision, blocks: torch.Tensor) -> None:
    """Let the kernel of the scores decide; it scores what selects, and nothing else."""
    num_rows, (_, num_heads, head_size) = len(rows.row_seq), rows.query.shape
    columns = columns_for([int(rows.candidate_end.max()) - N_INIT] * num_rows)
    first, last = columns.starts[[0, -1]].tolist()
    logits = empty_columns(last - first, num_heads)
    parts = torch.zeros((2, num_rows, num_heads, NUM_PARTS), device=DEVICE)
    keys = torch.randn(len(blocks.flatten()), KV_HEADS, 2, BLOCK_SIZE, head_size, device=DEVICE)
    own = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    score_paged_keys(
        query=rows.query,
        kv_cache=keys.to(rows.query.dtype),
        block_table=blocks,
        tiles=torch.stack([rows.row_seq, own, rows.query_len], dim=1).to(torch.int32),
        rows_per_tile=1,
        scale=1.0,
        key_scale=None,
        scores=Scores(logits, columns, *parts, N_INIT, decision.rows.scored_end),
        query_start=rows.query_start,
        decision=decision,
        programs=3,
    )
    scored = unpacked(logits, columns, first)
    for row, end in enumerate(decision.rows.scored_end.tolist()):
        candidates = end - N_INIT if rows.query_len[row] else 0
        assert not scored[row, :, :candidates].isnan().any()
        assert scored[row, :, triton.cdiv(candidates, 4) * 4 :].isnan().all()


def outcome(reused_end, slots, lengths, counters, state) -> dict[str, torch.Tensor]:
    found = {
        "reused_end": reused_end,
        "slots": slots,
        "lengths": lengths,
        "counters": counters,
    }
    stored = () if state is None else fields(state)
    return found | {field.name: getattr(state, field.name) for field in stored}


def test_rows_of_any_kind_are_finished_side_by_side(monkeypatch: pytest.MonkeyPatch):
    """They select, reuse, see their whole context, or are padded; seats are in no order."""
    monkeypatch.setattr(gpu_digits, "PART_TOKENS", 512)
    chains = [(2, 11, [700]), (0, 12, [1000]), (3, 13, [N_INIT + TOP_K]), (1, 14, [2000])]
    query = cases.queries([0, 1, 2, 3])
    rows = cases.rows_of(chains, query, padding=2, empty_chains=1)
    reuses, lengths, _, state = assert_finished(rows, cases.new_state(query))
    assert reuses == [False] * 6
    query = cases.queries([0, 9, 2, 3])  # the second is another
    chains = [(seat, owner, [end + 1]) for seat, owner, (end,) in chains]
    rows = cases.rows_of(chains, query, padding=2, empty_chains=1)
    reuses, lengths, counted, state = assert_finished(rows, state, seed=1)
    assert reuses == [True, False, False, True, False, False]
    assert lengths[0] == N_INIT + TOP_K + N_LOCAL + 2
    assert counted[:2] == [2, 2]
    rows = cases.rows_of([(seat, owner, [end[0] + 1]) for seat, owner, end in chains], query)
    reuses, *_ = assert_finished(rows, state, seed=2)
    assert reuses == [True] * 4


def test_rows_that_take_no_part_are_not_remembered():
    query = cases.queries([0, 0, 1])
    rows = cases.rows_of([(2, 7, [800]), (2, 7, [801]), (1, 8, [900])], query)
    rows.caches[:2] = False  # the end of a prompt, which has its request's seat
    rows.chains[:2] = 0
    reuses, _, counted, state = assert_finished(rows, cases.new_state(query))
    assert reuses == [False] * 3
    assert counted[0] == 3
    assert (state.selected[2] == UNTOUCHED).all()
    assert (state.selected[1] != UNTOUCHED).all()


@pytest.mark.parametrize("top_k", [1, 493, TOP_K, FULL_ATTENTION])
def test_a_line_of_the_state_is_as_long_as_the_requests_own_top_k(top_k: int):
    query = cases.queries([0])
    state = cases.new_state(query)
    for end in (800, 801):
        rows = cases.rows_of([(2, 3, [end])], query, top_k)
        reuses, _, _, state = assert_finished(rows, state, seed=end)
    assert reuses == [top_k != FULL_ATTENTION]
    stored = 0 if top_k == FULL_ATTENTION else N_INIT + top_k
    assert (state.selected[2, stored:] == UNTOUCHED).all()


def test_without_a_state_rows_select_and_are_counted():
    query = cases.queries([0, 0])
    rows = cases.rows_of([(0, 1, [800]), (1, 2, [900])], query, padding=1)
    reuses, _, counted, _ = assert_finished(rows, None)
    assert reuses == [False] * 3
    assert counted[:2] == [2, 0]
