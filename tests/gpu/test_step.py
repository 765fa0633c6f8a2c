"""A step on a GPU is the definition of the method: eager, and as a CUDA graph would replay it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import (
    CONFIG,
    HEAD_SIZE,
    REQUESTS,
    SCALE,
    expected_attention,
    paged_step,
    rotation,
)
from vllm_tokenselect.gpu import limits as limits_module
from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.gpu.rows import graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.block_table import gpu_digits
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method, SettingsError

REASSIGNING = replace(CONFIG, positions="reassigned")
MAX_LEN, MAX_TOKENS = 256, 256
Request = tuple[int, int, int]  # first position, end, prompt length


def groups_of_rows(monkeypatch, limits: StepLimits, rows: int) -> None:
    """Cut groups of so many rows at most, as a sparse block table of few lines does."""
    monkeypatch.setattr(limits_module, "TABLE_BYTES", 4 * limits.line_width * rows)


class Layer:
    """A layer's tensors on the device, and what a server allocates for it."""

    def __init__(
        self,
        requests: list[Request],
        heads: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        workspace_bytes: int = 1 << 20,
        method: Method = CONFIG,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.method, self.sinks = method, sinks
        self.query, self.kv_cache, self.block_table = paged_step(requests, *heads, dtype)
        # As vLLM lays it out on GPUs: all heads of a token together.
        pages = self.kv_cache.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
        self.cache = LayerCache(
            pages.to(DEVICE),
            rotation=rotation_of(method),
            sinks=None if sinks is None else sinks.to(DEVICE),
        )
        self.limits = StepLimits(
            method, *heads, MAX_LEN, workspace_bytes, max_tokens=MAX_TOKENS, graph_rows=8
        )
        self.workspace = Workspace(self.limits, HEAD_SIZE, torch.device(DEVICE), dtype=dtype)
        self.attention = SdpaAttention(
            GatherBuffer(heads[1], HEAD_SIZE, dtype, CONFIG.max_attended, torch.device(DEVICE))
        )

    def run(self, groups) -> torch.Tensor:
        out = torch.full_like(self.query, float("nan")).to(DEVICE)
        GpuStep(groups, self.block_table.to(DEVICE)).run_layer(
            self.query.to(DEVICE), self.cache, SCALE, self.workspace, self.attention, out
        )
        return out.cpu()

    def expected(self, requests: list[Request], soft_cap: float = 0.0) -> torch.Tensor:
        tensors = (self.query, self.kv_cache, self.block_table)
        reassigned = self.method.reassigns_positions
        return expected_attention(requests, *tensors, reassigned, self.sinks, soft_cap)


def rotation_of(method: Method) -> Rotation | None:
    """The definition's on the device; None where positions are native."""
    if not method.reassigns_positions:
        return None
    defined = rotation()
    return Rotation(defined.cos_sin.to(DEVICE), defined.vote.to(DEVICE))


def ends_of(requests: list[Request]) -> np.ndarray:
    return np.array([end for _, end, _ in requests], np.int32)


def plan_of(requests: list[Request], padding: int = 0, method: Method = CONFIG) -> SelectionPlan:
    lens = [end - first for first, end, _ in requests] + [0] * padding
    return SelectionPlan.build(
        np.cumsum([0, *lens]).astype(np.int32),
        np.append(ends_of(requests), [0] * padding).astype(np.int32),
        BatchRequests.without_seats(
            np.array([prompt for _, _, prompt in requests] + [0] * padding, np.int32), method.top_k
        ),
        method,
    )


def on_device(lens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(lens.astype(np.int32)).to(DEVICE)


def groups_of(requests: list[Request], layer: Layer):
    ends = ends_of(requests)
    return step_rows(plan_of(requests), ends, on_device(ends), layer.limits)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)], ids=lambda h: f"H{h[0]}/{h[1]}")
def test_every_query_attends_to_what_the_definition_says(name, heads):
    requests = REQUESTS[name]
    layer = Layer(requests, heads)
    out = layer.run(groups_of(requests, layer))
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


def test_half_precision_agrees_within_its_rounding():
    requests = REQUESTS["mixed"]
    layer = Layer(requests, (6, 2), torch.float16)
    error = (layer.run(groups_of(requests, layer)).float() - layer.expected(requests)).abs().mean()
    assert error < 4e-3


def test_a_quantized_cache_is_scored_and_attended_with_its_scales():
    requests = REQUESTS["mixed"]
    layer = Layer(requests, (6, 2))
    quantized = layer.cache.pages.to(torch.float8_e4m3fn)
    scales = [torch.tensor(s, device=DEVICE) for s in (0.5, 1.5)]
    layer.cache = LayerCache(quantized, *scales)
    out = layer.run(groups_of(requests, layer))
    keys_and_values = quantized.float().cpu()
    layer.kv_cache = keys_and_values * torch.tensor([0.5, 1.5])[:, None, None]
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


def test_a_workspace_of_one_row_gives_the_same_result():
    requests = REQUESTS["mixed"]
    whole = Layer(requests, (6, 2))
    row_bytes = 4 * 7 * whole.limits.max_width
    rowwise = Layer(requests, (6, 2), workspace_bytes=row_bytes)
    groups = groups_of(requests, rowwise)
    assert len(groups) > len(groups_of(requests, whole))
    torch.testing.assert_close(rowwise.run(groups), whole.run(groups_of(requests, whole)))


def votes_of_chunks(layer: Layer, requests: list[Request]) -> list[torch.Tensor]:
    """Votes of every row of several queries that selects."""
    step = GpuStep([], layer.block_table.to(DEVICE))
    found = []
    for group in groups_of(requests, layer):
        if not group.rescores:
            continue
        query = layer.query[group.queries].to(DEVICE)
        step.score(group, query, layer.cache, SCALE, layer.workspace)
        step.vote(group, layer.cache, SCALE, layer.workspace)
        columns, ends = group.columns.starts.tolist(), group.scored_end.tolist()
        for row, end in enumerate(ends):
            if end > CONFIG.n_init:
                own = slice(columns[row], columns[row] + end - CONFIG.n_init)
                found.append(layer.workspace.votes(group)[own].clone())
    return found


def test_a_chunk_votes_the_same_bits_however_its_prompt_is_cut_into_steps():
    prompt = (64, 192, 220)
    layer = Layer([prompt], (6, 2))
    whole = votes_of_chunks(layer, [prompt])
    query, chunk = layer.query, CONFIG.query_chunk
    apart = []
    for first in range(64, 192, chunk):
        layer.query = query[first - 64 : first - 64 + chunk]
        apart += votes_of_chunks(layer, [(first, first + chunk, 220)])
    assert len(whole) == len(apart) > 2
    assert all(torch.equal(*pair) for pair in zip(whole, apart, strict=True))


def test_the_parts_of_a_row_change_no_bit(monkeypatch):
    requests = REQUESTS["mixed"]
    layer = Layer(requests, (6, 2))
    whole = layer.run(groups_of(requests, layer))
    monkeypatch.setattr(gpu_digits, "PART_TOKENS", 64)
    layer.workspace = Workspace(layer.limits, HEAD_SIZE, torch.device(DEVICE))
    groups = groups_of(requests, layer)
    assert max(group.columns.widest for group in groups) > 64
    assert torch.equal(layer.run(groups), whole)


class Graph:
    """A decoding step as a CUDA graph sees it: tensors are fixed at capture, then only rewritten."""

    def __init__(self, layer: Layer, num_tokens: int, queries: int) -> None:
        self.layer, self.num_tokens, self.queries = layer, num_tokens, queries
        self.buffers = RowBuffers(num_tokens, torch.device(DEVICE))
        dummy = [(0, queries, queries)] * (num_tokens // queries)
        self.captured = self.write(dummy, ends_of(dummy))

    def write(self, requests: list[Request], device_ends: np.ndarray):
        padding = self.num_tokens // self.queries - len(requests)
        return graph_rows(
            plan_of(requests, padding, self.layer.method),
            np.append(ends_of(requests), [0] * padding).astype(np.int32),
            on_device(np.append(device_ends, [0] * padding)),
            self.layer.limits,
            self.buffers,
            self.num_tokens,
            self.queries,
        )

    def replay(self, requests: list[Request], device_ends: np.ndarray | None = None):
        """Rewrite the buffers for a step, and run what was captured."""
        self.write(requests, ends_of(requests) if device_ends is None else device_ends)
        return self.layer.run(self.captured)


@pytest.mark.parametrize("rows", [512, 5], ids=["one group", "several groups"])
def test_a_captured_decoding_step_serves_any_later_one(rows, monkeypatch):
    earlier = [(150, 151, 100), (30, 31, 20), (199, 200, 64), (45, 46, 45), (120, 121, 9)]
    requests = [(30, 31, 30), (180, 181, 100), (60, 61, 10)]
    layer = Layer(requests, (6, 2))
    groups_of_rows(monkeypatch, layer.limits, rows)
    layer.query = torch.cat([layer.query, layer.query])  # queries of padded requests
    graph = Graph(layer, num_tokens=6, queries=1)
    assert [group.num_rows for group in graph.captured] == ([6] if rows == 512 else [5, 1])
    graph.write(earlier, ends_of(earlier))
    out = graph.replay(requests)[: len(requests)]
    layer.query = layer.query[: len(requests)]
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


def test_the_device_decides_where_draft_tokens_were_rejected():
    # The host believes that every draft was accepted; the device knows that two were not, which
    # moves the first request's rows and lets the second's see their whole context.
    believed = [(152, 155, 100), (46, 49, 20)]
    real = [(150, 153, 100), (43, 46, 20)]
    layer = Layer(real, (6, 2))
    groups = graph_rows(
        plan_of(believed),
        ends_of(believed),
        on_device(ends_of(real)),
        layer.limits,
        RowBuffers(6, torch.device(DEVICE)),
        6,
        3,
    )
    out = layer.run(groups)
    torch.testing.assert_close(out, layer.expected(real), rtol=2e-4, atol=2e-5)


def test_a_workspace_too_small_for_one_query_is_refused():
    with pytest.raises(SettingsError, match=r"workspace_mb=1 cannot hold .* at least 15\b"):
        StepLimits(Method(), 28, 4, 131072, 1 << 20)


def test_a_workspace_larger_than_kernels_can_number_is_refused():
    assert StepLimits(Method(), 28, 4, 131072, 8191 << 20).score_columns * 28 < 1 << 31
    with pytest.raises(SettingsError, match=r"workspace_mb=8192 is more .* at most 8191\b"):
        StepLimits(Method(), 28, 4, 131072, 8192 << 20)
