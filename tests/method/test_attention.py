"""A step through the plan, the sparse block table and attention is the definition of the method."""

import numpy as np
import pytest
import torch

from tests.method.definition import (
    BLOCK_SIZE,
    CONFIG,
    HEAD_SIZE,
    REQUESTS,
    SCALE,
    expected_attention,
    paged_step,
    rotation,
)
from vllm_tokenselect.cpu.attention import SdpaAttention, attend
from vllm_tokenselect.cpu.step import StepSelection
from vllm_tokenselect.kernels.operations import cpu_operations, reference_operations
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests


def served_attention(
    requests,
    query,
    kv_cache,
    block_table,
    operations,
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
    counts = torch.zeros(5, dtype=torch.int64)
    step = StepSelection(
        plan, block_table, BLOCK_SIZE, query.shape[1], CONFIG, operations, counts, workspace_bytes
    )
    step.select(query, kv_cache, SCALE, turn)
    out = torch.full_like(query, float("nan"))
    scratch = kv_cache.new_empty(2, CONFIG.max_attended, kv_cache.shape[1], HEAD_SIZE)
    library = SdpaAttention(SCALE, sinks, soft_cap)
    attend(query, kv_cache, step, None, SCALE, library, scratch, out, turn, sinks, soft_cap)
    assert not counts.any(), "these requests are nobody's"
    return out


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (8, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
@pytest.mark.parametrize("operations", [reference_operations, cpu_operations])
def test_every_query_attends_to_what_the_definition_says(name, heads, operations):
    requests = REQUESTS[name]
    tensors = paged_step(requests, *heads, torch.float32)
    served = served_attention(requests, *tensors, operations())
    torch.testing.assert_close(served, expected_attention(requests, *tensors), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
@pytest.mark.parametrize("operations", [reference_operations, cpu_operations])
def test_reassigned_positions_are_those_of_the_definition(name, heads, operations):
    requests = REQUESTS[name]
    tensors = paged_step(requests, *heads, torch.float32)
    served = served_attention(requests, *tensors, operations(), turn=rotation())
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
    for operations in (reference_operations(), cpu_operations()):
        served = served_attention(requests, *tensors, operations, turn=turn, **softmax)
        torch.testing.assert_close(served, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_agree_with_the_definition_within_their_rounding(dtype):
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, 6, 2, dtype)
    served = served_attention(requests, *tensors, cpu_operations())
    error = (served.float() - expected_attention(requests, *tensors)).abs().mean()
    assert error < 4e-3


def test_a_bounded_score_workspace_gives_the_same_result():
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, 6, 2, torch.float32)
    whole = served_attention(requests, *tensors, reference_operations())
    row_by_row = served_attention(requests, *tensors, reference_operations(), workspace_bytes=1)
    assert torch.equal(whole, row_by_row)
