"""A step through the plan, the sparse block table and attention is the definition of the method."""

import numpy as np
import pytest
import torch

from vllm_tokenselect import selection
from vllm_tokenselect.attention import SdpaAttention, attend
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.kernels.operations import cpu_operations, reference_operations
from vllm_tokenselect.plan import SelectionPlan
from vllm_tokenselect.selection import StepSelection

CONFIG = TokenSelectConfig(top_k=24, n_init=4, n_local=16, query_chunk=32, tail_queries=3)
BLOCK_SIZE, HEAD_SIZE = 16, 32
SCALE = HEAD_SIZE**-0.5


def defined_attention(query, keys, values, position, chunk, mean_query):
    """Output of one query, from design to numbers, with no paging and no batching.

    query, mean_query [Hq, D]; keys, values [n, Hkv, D].
    """
    start = chunk[0]
    group = len(query) // keys.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    candidates = range(CONFIG.n_init, start - CONFIG.n_local)
    visible = set(range(position + 1))
    if len(candidates) > CONFIG.top_k:
        logits = torch.einsum("hd,nhd->hn", mean_query, k[CONFIG.n_init : start - CONFIG.n_local])
        votes = (logits * SCALE).softmax(-1).sum(0)
        order = sorted(range(len(votes)), key=lambda i: (-votes[i].item(), i))
        selected = {CONFIG.n_init + i for i in order[: CONFIG.top_k]}
        local = {p for p in visible if p >= start - CONFIG.n_local}
        visible = set(range(CONFIG.n_init)) | selected | local
    index = sorted(visible)
    weights = (torch.einsum("hd,nhd->hn", query, k[index]) * SCALE).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v[index])


def paged_step(requests, num_heads, num_kv_heads, dtype, seed=0):
    """Random keys and values of (first, end, prompt) requests in shuffled pages."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-end // BLOCK_SIZE) for _, end, _ in requests]
    kv_cache = torch.randn(
        sum(num_blocks) + 1, num_kv_heads, 2, BLOCK_SIZE, HEAD_SIZE, generator=generator
    ).to(dtype)
    shuffled = (torch.randperm(sum(num_blocks), generator=generator) + 1).to(torch.int32)
    block_table = torch.zeros(len(requests), max(num_blocks), dtype=torch.int32)
    for row, blocks in enumerate(shuffled.split(num_blocks)):
        block_table[row, : len(blocks)] = blocks
    num_queries = sum(end - first for first, end, _ in requests)
    query = torch.randn(num_queries, num_heads, HEAD_SIZE, generator=generator).to(dtype)
    return query, kv_cache, block_table


def served_attention(requests, query, kv_cache, block_table, operations):
    lens = [end - first for first, end, _ in requests]
    plan = SelectionPlan.build(
        np.cumsum([0, *lens]).astype(np.int32),
        np.array([end for _, end, _ in requests], np.int32),
        np.array([prompt for _, _, prompt in requests], np.int32),
        CONFIG,
    )
    step = StepSelection(plan, block_table, BLOCK_SIZE, query.shape[1], CONFIG, operations)
    step.select(query, kv_cache, SCALE)
    out = torch.full_like(query, float("nan"))
    scratch = kv_cache.new_empty(2, CONFIG.max_attended, kv_cache.shape[1], HEAD_SIZE)
    attend(query, kv_cache, step, SCALE, SdpaAttention(SCALE), scratch, out)
    return out


def expected_attention(requests, query, kv_cache, block_table):
    outputs, first_query = [], 0
    for row, (first, end, prompt) in enumerate(requests):
        pages = kv_cache[block_table[row].long()].float()  # [W, Hkv, 2, block, D]
        keys, values = (
            pages[:, :, i].transpose(1, 2).reshape(-1, *pages.shape[1:2], HEAD_SIZE) for i in (0, 1)
        )
        tail = CONFIG.tail_start(prompt)
        starts = [p for p in range(first, end) if p >= tail or p % CONFIG.query_chunk == 0]
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            offset = first_query - first
            chunk = query[offset + start : offset + stop].float()
            for position in range(start, stop):
                outputs.append(
                    defined_attention(
                        chunk[position - start],
                        keys,
                        values,
                        position,
                        (start, stop),
                        chunk.mean(0),
                    )
                )
        first_query += end - first
    return torch.stack(outputs)


REQUESTS = {
    "prefill": [(0, 200, 200)],
    "chunked": [(64, 150, 300), (128, 160, 163)],
    "decode": [(150, 151, 100), (30, 31, 20), (199, 200, 64), (45, 46, 45)],
    "mixed": [(96, 200, 190), (99, 100, 50), (0, 40, 40), (32, 64, 500)],
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (8, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
@pytest.mark.parametrize("operations", [reference_operations, cpu_operations])
def test_every_query_attends_to_what_the_definition_says(name, heads, operations):
    requests = REQUESTS[name]
    tensors = paged_step(requests, *heads, torch.float32)
    served = served_attention(requests, *tensors, operations())
    torch.testing.assert_close(served, expected_attention(requests, *tensors), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_agree_with_the_definition_within_their_rounding(dtype):
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, 6, 2, dtype)
    served = served_attention(requests, *tensors, cpu_operations())
    error = (served.float() - expected_attention(requests, *tensors)).abs().mean()
    assert error < 4e-3


def test_a_bounded_score_workspace_gives_the_same_result(monkeypatch):
    requests = REQUESTS["mixed"]
    tensors = paged_step(requests, 6, 2, torch.float32)
    whole = served_attention(requests, *tensors, reference_operations())
    monkeypatch.setattr(selection, "SCORE_WORKSPACE_BYTES", 1)
    row_by_row = served_attention(requests, *tensors, reference_operations())
    assert torch.equal(whole, row_by_row)
