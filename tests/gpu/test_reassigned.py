"""A step that gives the attended tokens positions anew is the definition, eager and as replayed."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.test_attention import flash
from tests.gpu.test_step import MAX_TOKENS, REASSIGNING, Graph, Layer, ends_of, groups_of
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import HEAD_SIZE, REQUESTS
from vllm_tokenselect.gpu.warmup import compile_gpu_kernels
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.layer_cache import LayerCache


def reassigning(requests, heads=(6, 2), *arguments) -> Layer:
    """A layer whose buffer for rotated queries holds what no step may read."""
    layer = Layer(requests, heads, *arguments, method=REASSIGNING)
    layer.workspace.rotated_queries.fill_(float("nan"))
    return layer


def assert_defined(out: torch.Tensor, layer: Layer, requests) -> None:
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("prefill", (2, 1)), ("chunked", (3, 3)), ("decode", (8, 1)), ("decode", (7, 1))],
)
def test_every_query_attends_to_what_the_definition_says(name, heads):
    requests = REQUESTS[name]
    layer = reassigning(requests, heads)
    assert_defined(layer.run(groups_of(requests, layer)), layer, requests)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_agrees_within_its_rounding(dtype):
    requests = REQUESTS["decode"]
    layer = reassigning(requests, (6, 2), dtype)
    error = (layer.run(groups_of(requests, layer)).float() - layer.expected(requests)).abs().mean()
    assert error < (4e-3 if dtype == torch.float16 else 3e-2)


def test_keys_of_a_quantized_cache_are_rotated_with_their_scale():
    requests = REQUESTS["decode"]
    layer = reassigning(requests)
    quantized = layer.cache.pages.to(torch.float8_e4m3fn)
    scales = [torch.tensor(s, device=DEVICE) for s in (0.5, 1.5)]
    layer.cache = LayerCache(quantized, *scales, rotation=layer.cache.rotation)
    layer.kv_cache = quantized.float().cpu() * torch.tensor([0.5, 1.5])[:, None, None]
    assert_defined(layer.run(groups_of(requests, layer)), layer, requests)


def test_rows_of_several_groups_keep_their_own_positions():
    requests = REQUESTS["mixed"]
    row_bytes = 4 * 7 * Layer(requests, (6, 2)).limits.max_width
    layer = reassigning(requests, (6, 2), torch.float32, row_bytes)
    groups = groups_of(requests, layer)
    assert len(groups) > 1
    assert_defined(layer.run(groups), layer, requests)


def test_a_captured_decoding_step_serves_any_later_one():
    earlier = [(150, 151, 100), (30, 31, 20), (199, 200, 64), (45, 46, 45), (120, 121, 9)]
    requests = [(30, 31, 30), (180, 181, 100), (60, 61, 10)]
    layer = reassigning(requests)
    layer.query = torch.cat([layer.query, layer.query])  # queries of padded requests
    graph = Graph(layer, num_tokens=6, queries=1)
    graph.write(earlier, ends_of(earlier))
    out = graph.replay(requests)[: len(requests)]
    layer.query = layer.query[: len(requests)]
    assert_defined(out, layer, requests)


def test_positions_follow_the_length_that_the_device_knows():
    # The host believes that every draft was accepted; the device knows that two were not.
    believed, real = [(152, 155, 100), (46, 49, 20)], [(150, 153, 100), (43, 46, 20)]
    layer = reassigning(real)
    layer.attention = flash(layer, "2 gathered")
    out = Graph(layer, num_tokens=6, queries=3).replay(believed, ends_of(real))
    assert_defined(out, layer, real)


def test_a_step_longer_than_the_buffer_is_refused():
    requests = [(0, MAX_TOKENS + 2, 2 * MAX_TOKENS)]
    layer = reassigning(requests, (1, 1))
    with pytest.raises(RuntimeError, match="shape"):
        layer.run(groups_of(requests, layer))


def test_the_warm_up_needs_no_longer_step_than_a_server_of_one_request_has():
    layer = reassigning(REQUESTS["decode"], (2, 1))
    limits = replace(layer.limits, max_tokens=REASSIGNING.query_chunk + 1)
    workspace = Workspace(limits, HEAD_SIZE, torch.device(DEVICE))
    compile_gpu_kernels(workspace, layer.attention, layer.cache, 16, torch.float32)


def test_queries_stay_where_they_are_if_positions_are_native():
    layer = Layer(REQUESTS["decode"], (6, 2))
    assert layer.workspace.rotated_queries.numel() == 0
