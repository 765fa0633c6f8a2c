"""Rows are decided alike by the kernel of the scores and by that of chains."""

from __future__ import annotations

import pytest
import torch

from tests.kernels_gpu import test_finished_table as finished
from tests.kernels_gpu import test_selection_cache as cases
from tests.kernels_gpu.cases import DEVICE, int32
from vllm_tokenselect.kernels.selection_cache.gpu_decide import decide_rows


@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(28, 4, 128), (6, 6, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whoever_decides_adds_up_in_the_same_order(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """So a request is served alike whether its tokens are decided one by one, or again in one step."""
    monkeypatch.setattr(cases, "KV_HEADS", kv_heads)
    monkeypatch.setattr(finished, "KV_HEADS", kv_heads)
    seats = range(2)
    stored = cases.queries([0, 1], heads, head_size, dtype)
    state = cases.new_state(stored)
    state.query[:2] = stored
    state.owner[:2] = int32(1, 2)
    state.candidate_end[:] = 30
    query = cases.queries([0, 1], heads, head_size, dtype, seed=1)
    own, last = (x.double().view(2, kv_heads, -1) for x in (query, stored))
    cosines = ((own * last).sum(2) / own.norm(dim=2) / last.norm(dim=2)).min(dim=1).values
    rows = cases.rows_of([(seat, seat + 1, [31]) for seat in seats], query, top_k=1)
    blocks = torch.arange(8, dtype=torch.int32, device=DEVICE).view(4, 2)
    found = []
    for cosine in cosines.float():
        for ulps in (-1, 0, 1):
            monkeypatch.setattr(cases, "THRESHOLD", float(cosine) + ulps * 2**-24)
            decided = []
            for by_scores in (False, True):
                ends = [rows.candidate_end.clone(), rows.context_end, rows.candidate_end.clone()]
                arrays = rows.arrays(*ends)
                decision = rows.decision(arrays, cases.copy_of(state))
                if by_scores:
                    finished.score_and_decide(rows, decision, blocks)
                else:
                    decide_rows(decision)
                decided.append(arrays.reused_end.tolist())
            assert decided[0] == decided[1]
            found.append(decided[0])
    assert len({tuple(each) for each in found}) > 1
