"""A step through the plan, the sparse block table and attention is the definition of the method."""

import numpy as np
import pytest
import torch

from tests.method.definition import (
    BLOCK_SIZE,
    CONFIG,
    REQUESTS,
    SCALE,
    expected_attention,
    paged_step,
    rotation,
)
from tests.oracle.step import ReferenceStep, sdpa_attention
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests


def served_attention(
    requests,
    query,
    kv_cache,
    block_table,
    step_class=CpuStep,
    workspace_bytes=32 << 20,
    turn=None,
    sinks=None,
    soft_cap=0.0,
):
    lens = [end - first for first, end, _ in requests]
    plan = SelectionPlan.build(
        np.cumsum([0, *lens]).astype(np.int32),
        np.array([end for _, end, _ in requests], np.int32),
        BatchRequests.without_seats(
            np.array([prompt for _, _, prompt in requests], np.int32), CONFIG.top_k
        ),
        CONFIG,
    )
    counts = torch.zeros(len(Counter), dtype=torch.int64)
    step = step_class.of_plan(
        plan, block_table, BLOCK_SIZE, query.shape[1], CONFIG, counts, workspace_bytes
    )
    out = torch.full_like(query, float("nan"))
    cache = LayerCache(kv_cache, rotation=turn, sinks=sinks, soft_cap=soft_cap)
    step.run_layer(query, cache, SCALE, sdpa_attention(cache, CONFIG.max_attended), out)
    assert not counts.any(), "these requests are nobody's"
    return out


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (8, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
@pytest.mark.parametrize("step", [ReferenceStep, CpuStep])
def test_every_query_attends_to_what_the_definition_says(name, heads, step):
    requests = REQUESTS[name]
    tensors = paged_step(requests, *heads, torch.float32)
    served = served_attention(requests, *tensors, step)
    torch.testing.assert_close(served, expected_attention(requests, *tensors), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
@pytest.mark.parametrize("step", [ReferenceStep, CpuStep])
def test_reassigned_positions_are_those_of_the_definition(name, heads, step):
    requests = REQUESTS[name]
    tensors = paged_step(requests, *heads, torch.float32)
    served = served_attention(requests, *tensors, step, turn=rotation())
    expected = expected_attention(requests, *tensors, reassigned=True)
    torch.testing.assert_close(served, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (8, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
@pytest.mark.parametrize("reassigned", [False, True])
def test_sinks_and_caps_are_those_of_the_definition(heads, reassigned):
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, *heads, torch.float32)
    softmax = {"sinks": torch.linspace(-2, 6, heads[0]), "soft_cap": 1.5}
    turn = rotation() if reassigned else None
    expected = expected_attention(requests, *tensors, reassigned, **softmax)
    for step in (ReferenceStep, CpuStep):
        served = served_attention(requests, *tensors, step, turn=turn, **softmax)
        torch.testing.assert_close(served, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_agree_with_the_definition_within_their_rounding(dtype):
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, 6, 2, dtype)
    served = served_attention(requests, *tensors)
    error = (served.float() - expected_attention(requests, *tensors)).abs().mean()
    assert error < 4e-3


def test_a_bounded_score_workspace_gives_the_same_result():
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, 6, 2, torch.float32)
    whole = served_attention(requests, *tensors, ReferenceStep)
    row_by_row = served_attention(requests, *tensors, ReferenceStep, workspace_bytes=1)
    assert torch.equal(whole, row_by_row)
