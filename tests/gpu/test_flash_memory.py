"""What FlashAttention allocates by itself stays small: vLLM's memory profile sees no attention."""

import pytest
import torch

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_step import ends_of, on_device, plan_of
from vllm_tokenselect.gpu import attention as gpu_attention
from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.flash_attention import (
    SPLIT_BYTES,
    GatheredFlashAttention,
    PagedFlashAttention,
)
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.rows import graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.method.settings import Method

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_SIZE = 28, 4, 128  # Qwen2-7B
LIMITS = StepLimits(Method(), HEADS, KV_HEADS, 131072, 512 << 20)
STEPS = {
    "chunks, a tail and a token": [(32768, 36864, 131072), (9000, 13032, 13032), (70000, 70001, 5)],
    "short prompts": [(0, 16, 16)] * 512,
    "a prompt and tokens": [(0, 7936, 7936), *((70000, 70001, 50) for _ in range(256))],
}


def most_bytes(groups, version: int, in_place: bool) -> int:
    """Largest allocation in one layer of a step; what is attended is not looked at."""
    library = FlashAttentionModel(version, attends=False)
    attention = PagedFlashAttention(library)
    if not in_place:
        width = LIMITS.table_width
        buffer = GatherBuffer(KV_HEADS, HEAD_SIZE, torch.float16, width, CPU)
        attention = GatheredFlashAttention(library, version, buffer)
    pages = torch.empty(2, 16, KV_HEADS, 2, HEAD_SIZE, dtype=torch.float16)
    cache = LayerCache(pages.permute(0, 2, 3, 1, 4))
    query = torch.empty(8192, HEADS, HEAD_SIZE, dtype=torch.float16)
    for group in groups:
        table = SparseBlockTable(
            slots=torch.empty(group.num_rows, LIMITS.table_width, dtype=torch.int32),
            lengths=torch.zeros(group.num_rows, dtype=torch.int32),
        )
        own = query[group.queries]
        attention(own, cache, group, table, 0.1, torch.empty_like(own))
    return library.most_bytes


@pytest.mark.parametrize(
    ("version", "in_place"),
    [(3, True), (3, False), (4, False)],
    ids=["3 in place", "3 gathered", "4 gathered"],
)
@pytest.mark.parametrize("name", [*STEPS, "decoding", "decoding with drafts"])
def test_a_step_allocates_little_for_partial_outputs(name, version, in_place, monkeypatch):
    monkeypatch.setattr(gpu_attention, "gather_rows", lambda *arguments, **options: None)
    if name in STEPS:
        step = STEPS[name]
        assert sum(end - first for first, end, _ in step) <= 8192
        ends = ends_of(step)
        groups = step_rows(plan_of(step, method=LIMITS.method), ends, on_device(ends), LIMITS)
    else:
        drafts = 4 if "drafts" in name else 1
        step = [(7000, 7000 + drafts, 50)] * (512 // drafts)
        ends, buffers = ends_of(step), RowBuffers(512, CPU)
        plan = plan_of(step, method=LIMITS.method)
        groups = graph_rows(plan, ends, on_device(ends), LIMITS, buffers, 512, drafts)
    assert most_bytes(groups, version, in_place) <= SPLIT_BYTES
