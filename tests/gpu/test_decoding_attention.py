"""Decoding rows go to the own kernel and say what the definition says; others go to the library."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.test_attention import buffer_of
from tests.gpu.test_graph_size import Launches
from tests.gpu.test_poison import clean, poison_what_no_request_wrote
from tests.gpu.test_sinks_and_caps import SINKS
from tests.gpu.test_step import (
    CONFIG,
    DEVICE,
    HEAD_SIZE,
    REASSIGNING,
    Graph,
    Layer,
    ends_of,
    groups_of,
)
from tests.method.definition import REQUESTS, SCALE
from vllm_tokenselect.gpu.attention import RowAttention
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention, count_attending, make_scratch
from vllm_tokenselect.gpu.graph_size import count_launches
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.gpu.plain_attention import PlainAttention
from vllm_tokenselect.gpu.step import GpuStep

DECODING = [(30, 31, 30), (180, 181, 100), (60, 61, 10), (150, 151, 100)]


def own(layer: Layer, library: RowAttention, soft_cap: float = 0.0) -> DecodingAttention:
    scratch = make_scratch(layer.limits, HEAD_SIZE, torch.device(DEVICE))
    for left in (scratch.weighted, scratch.maxima, scratch.totals):
        left.fill_(float("nan"))
    return DecodingAttention(library, scratch, soft_cap=soft_cap)


class NoLibrary(SdpaAttention):
    """One that no row may reach."""

    def __init__(self) -> None:
        self.buffer_bytes = 0

    def __call__(self, *arguments) -> None:
        raise AssertionError("a row of few queries")


def decoding_layer(requests, method=CONFIG, sinks=None, padding=0, soft_cap=0.0) -> Layer:
    """A layer that has no library, and queries of padded requests."""
    layer = Layer(requests, (6, 2), method=method, sinks=sinks)
    layer.query = torch.cat([layer.query, layer.query[:padding]])
    layer.attention = own(layer, NoLibrary(), soft_cap)
    return layer


def assert_defined(out, layer: Layer, requests, soft_cap: float = 0.0) -> None:
    layer.query = layer.query[: sum(end - first for first, end, _ in requests)]
    expected = layer.expected(requests, soft_cap)
    torch.testing.assert_close(out[: len(expected)], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", [CONFIG, REASSIGNING], ids=["native", "reassigned"])
def test_a_captured_decoding_step_serves_any_later_one(method):
    earlier = [(150, 151, 100), (30, 31, 20), (199, 200, 64), (45, 46, 45), (120, 121, 9)]
    layer = decoding_layer(DECODING, method, padding=2)
    graph = Graph(layer, num_tokens=6, queries=1)
    graph.write(earlier, ends_of(earlier))
    out = graph.replay(DECODING)
    assert not out[4:].any(), "padded rows are zeros: whatever reads them all finds numbers"
    assert_defined(out, layer, DECODING)


@pytest.mark.parametrize("method", [CONFIG, REASSIGNING], ids=["native", "reassigned"])
def test_a_captured_step_with_drafts_attends_as_far_as_the_device_knows(method):
    # The host believes that every draft was accepted; the device knows that two were not.
    believed = [(152, 155, 100), (46, 49, 20)]
    real = [(150, 153, 100), (43, 46, 20)]
    layer = decoding_layer(real, method, padding=3)
    out = Graph(layer, num_tokens=9, queries=3).replay(believed, ends_of(real))
    assert_defined(out, layer, real)


def test_sinks_and_the_soft_cap_of_a_layer_are_read():
    layer = decoding_layer(DECODING, sinks=SINKS, soft_cap=0.5)
    out = Graph(layer, num_tokens=4, queries=1).replay(DECODING)
    assert_defined(out, layer, DECODING, soft_cap=0.5)


@pytest.mark.parametrize("method", [CONFIG, REASSIGNING], ids=["native", "reassigned"])
def test_longer_rows_go_to_the_library(method):
    requests = REQUESTS["mixed"]
    layer = Layer(requests, (6, 2), method=method, sinks=SINKS)
    library = PlainAttention(buffer_of(layer), 0.5)
    layer.attention = own(layer, library, 0.5)
    groups = groups_of(requests, layer)
    kinds = {lens > 8 for group in groups for lens in group.query_lens}
    assert kinds == {False, True}
    assert_defined(layer.run(groups), layer, requests, soft_cap=0.5)


@pytest.mark.parametrize("method", [CONFIG, REASSIGNING], ids=["native", "reassigned"])
def test_a_decoding_row_says_the_same_bits_beside_a_prompt(method):
    alone, prompt = [(180, 181, 100), (45, 46, 40)], (96, 150, 190)
    requests = [alone[0], prompt, alone[1]]
    layer = Layer(requests, (6, 2), method=method)
    layer.attention = own(layer, SdpaAttention(buffer_of(layer)))
    out = layer.run(groups_of(requests, layer))
    assert_defined(out, layer, requests)
    layer.query, layer.block_table = layer.query[[0, -1]], layer.block_table[[0, 2]]
    assert torch.equal(layer.run(groups_of(alone, layer)), out[[0, -1]])


def test_a_step_says_the_same_bits_whatever_lay_there_before():
    requests = [(199, 200, 100), (150, 151, 100), (45, 46, 45), (30, 31, 20)]
    layer = decoding_layer(requests)
    clean(layer)
    expected = layer.run(groups_of(requests, layer))
    poison_what_no_request_wrote(layer, requests)
    assert torch.equal(layer.run(groups_of(requests, layer)), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's launches")
@pytest.mark.parametrize("method", [CONFIG, REASSIGNING], ids=["native", "reassigned"])
def test_a_layer_that_follows_an_anchor_is_one_launch(method, monkeypatch):
    method = replace(method, anchor_layers=2)
    layer = decoding_layer(DECODING, method)
    graph = Graph(layer, num_tokens=4, queries=1)
    graph.replay(DECODING)
    layer.cache = replace(layer.cache, follows=True)
    step, out = GpuStep(graph.captured, layer.block_table), torch.empty_like(layer.query)
    with Launches(monkeypatch) as launched:
        step.run_layer(layer.query, layer.cache, SCALE, layer.workspace, layer.attention, out)

    def attending(rows: int) -> int:
        return count_attending(layer.limits, HEAD_SIZE, rows)

    assert launched.count == count_launches(layer.limits, 4, 1, attending, follows=True) == 1
