"""Rows on a GPU: tiles hold every selecting row once, groups fit the workspace, padding costs nothing."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # not on every machine with a GPU

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.test_step import ends_of, on_device, plan_of
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import CONFIG
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.rows import graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.kernels.score.gpu import tile_rows
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import FULL_ATTENTION

MAX_LEN = 2000


@st.composite
def requests(draw):
    """(first position, end, prompt length): whole prompts, ends of prompts, decoding."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, MAX_LEN // 32 - 8)) * 32
        end = draw(st.integers(first + 1, min(first + 200, MAX_LEN)))
        found.append((first, end, draw(st.sampled_from([end, end + 100, max(first - 20, 1)]))))
    return found


def tiled_rows(group) -> list[tuple[int, int]]:
    """(request, row) of every row of every tile, and that no tile is too large."""
    rows = []
    for tiles in group.tiles:
        for seq, first, count in tiles.table.tolist():
            assert count <= tiles.rows_per_tile
            assert first + count <= group.num_rows
            rows += [(seq, row) for row in range(first, first + count)]
    return rows


@given(
    requests(),
    st.sampled_from([(7, 1), (6, 2), (8, 8)]),
    st.integers(15, 22),
    st.sampled_from([1, 3, 40]),
)
@settings(max_examples=60, deadline=None)
def test_every_row_that_selects_is_in_one_tile_of_its_request(step, heads, log_bytes, few):
    workspace = max(1 << log_bytes, 4 * 9 * MAX_LEN)
    limits = StepLimits(CONFIG, *heads, MAX_LEN, workspace, graph_queries=few)
    plan, ends = plan_of(step), ends_of(step)
    first = 0
    for group in step_rows(plan, ends, on_device(ends), limits):
        rows = slice(first, first + group.num_rows)
        selecting = np.flatnonzero(~plan.dense[rows])
        expected = [(int(plan.row_seq[rows][row]), int(row)) for row in selecting]
        assert sorted(tiled_rows(group), key=lambda found: found[1]) == expected
        assert all(tiles.rows_per_tile <= tile_rows(*heads) for tiles in group.tiles)
        # Whatever stands beside a row, and however much the workspace holds.
        assert (group.rescores == (plan.query_len[rows][selecting] > few)).all()
        assert not group.rescores or len({tiles.rows_per_tile for tiles in group.tiles}) <= 1
        columns = np.diff(group.columns.starts.numpy())
        assert group.columns.starts[0] == 0
        most = limits.vote_columns if group.rescores else limits.score_columns
        assert columns.sum() == group.num_columns <= most
        candidates = plan.candidate_end[rows] - CONFIG.n_init
        assert (columns[selecting] >= candidates[selecting]).all()
        assert (columns[plan.dense[rows]] == 0).all()
        assert columns.max() == group.columns.widest
        assert group.context_end.tolist() == plan.chunk_end[rows].tolist()
        assert group.candidate_end.tolist() == plan.candidate_end[rows].tolist()
        first += group.num_rows
    assert first == plan.num_rows


def test_chunks_take_no_room_for_scores():
    heads, width = 6, 1984
    limits = StepLimits(CONFIG, heads, 2, MAX_LEN, 4 * (heads + 1) * width)
    end = MAX_LEN - 20
    chunks = [(end // 32 * 32 - 5 * 32, end // 32 * 32, MAX_LEN)]
    (group,) = step_rows(plan_of(chunks), ends_of(chunks), on_device(ends_of(chunks)), limits)
    assert group.rescores
    assert group.num_rows == 5
    tail = [(end - 3, end, end)]
    groups = step_rows(plan_of(tail), ends_of(tail), on_device(ends_of(tail)), limits)
    assert [each.num_rows for each in groups] == [1] * 3


def test_a_padded_row_of_a_captured_step_has_no_context_and_is_in_no_tile():
    step = [(1500, 1501, 20), (1400, 1401, 20)]
    limits = StepLimits(CONFIG, 6, 2, MAX_LEN, 1 << 20)
    buffers = RowBuffers(5, torch.device(DEVICE))
    ends = np.append(ends_of(step), [0, 0, 0]).astype(np.int32)
    (group,) = graph_rows(plan_of(step, 3), ends, on_device(ends), limits, buffers, 5, 1)
    assert group.context_end.tolist() == [1501, 1401, 0, 0, 0]
    assert group.scored_end.tolist()[2:] == [CONFIG.n_init] * 3
    assert group.query_start_loc.tolist() == [0, 1, 2, 2, 2, 2]
    assert group.columns.starts.diff().tolist() == [1536, 1408, 0, 0, 0]
    (tiles,) = group.tiles
    assert tiles.table.tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_the_tokens_of_a_request_share_a_tile_in_a_captured_step():
    step = [(1500, 1503, 20), (1400, 1403, 20)]
    limits = StepLimits(CONFIG, 6, 2, MAX_LEN, 1 << 20)
    buffers = RowBuffers(6, torch.device(DEVICE))
    ends = ends_of(step)
    (group,) = graph_rows(plan_of(step), ends, on_device(ends), limits, buffers, 6, 3)
    (tiles,) = group.tiles
    assert tiles.table[:2].tolist() == [[0, 0, 3], [1, 3, 3]]


def plan_with_seats(step: list[tuple[int, int, int]], top_k: list[int]) -> SelectionPlan:
    """As `plan_of`, of requests that have seats: request `i` seat `i`, owner `100 + i`."""
    lens = [end - first for first, end, _ in step]
    batch = BatchRequests.without_seats(np.array([p for _, _, p in step], np.int32), CONFIG.top_k)
    batch.seats[:] = np.arange(len(step))
    batch.owners[:] = 100 + batch.seats
    batch.top_k[:] = top_k
    starts = np.cumsum([0, *lens]).astype(np.int32)
    return SelectionPlan.build(starts, ends_of(step), batch, CONFIG)


@given(requests(), st.integers(15, 22), st.data())
@settings(max_examples=60, deadline=None)
def test_every_generated_token_that_selects_is_in_one_chain_of_its_request(step, log_bytes, data):
    limits = StepLimits(CONFIG, 6, 2, MAX_LEN, max(1 << log_bytes, 4 * 9 * MAX_LEN))
    sizes = [CONFIG.top_k, 1, FULL_ATTENTION]
    top_k = [data.draw(st.sampled_from(sizes)) for _ in step]
    plan, ends = plan_with_seats(step, top_k), ends_of(step)
    first = 0
    for group in step_rows(plan, ends, on_device(ends), limits):
        rows = slice(first, first + group.num_rows)
        found = []
        seats = []
        for start, count in group.chains.tolist():
            assert count > 0
            seats.append(int(group.cached_seat[start]))
            assert group.owner[start] == 100 + seats[-1]
            found += [(seats[-1], row) for row in range(start, start + count)]
        assert found == [
            (int(plan.seat[rows][row]), int(row)) for row in np.flatnonzero(plan.caches[rows])
        ]
        assert len(set(seats)) == len(seats), "two programs would write one line of the state"
        assert group.top_k.tolist() == plan.top_k[rows].tolist()
        assert group.seat.tolist() == plan.seat[rows].tolist()
        longest = plan.num_attended(CONFIG)[rows][plan.query_len[rows] == 1].max(initial=0)
        assert longest <= group.max_length
        first += group.num_rows


def test_a_captured_step_has_a_chain_for_every_row_however_many_are_used():
    step = [(1500, 1501, 20), (30, 31, 20)]
    limits = StepLimits(CONFIG, 6, 2, MAX_LEN, 1 << 20, full_attention=True)
    ends = ends_of(step)
    plan = plan_with_seats(step, [CONFIG.top_k] * 2)
    (group,) = graph_rows(
        plan, ends, on_device(ends), limits, RowBuffers(3, torch.device(DEVICE)), 3, 1
    )
    assert group.chains.tolist() == [[0, 1], [0, 0], [0, 0]]
    assert group.owner.tolist() == [100, 101, 0]
    assert group.max_length == MAX_LEN
    assert group.reused_end.tolist() == [-1] * 3
    assert group.table_end.tolist() == [1501, 31, 0]
