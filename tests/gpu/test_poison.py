"""Whatever lay in a block, a buffer or the workspace before does not reach a request."""

import pytest
import torch

from tests.gpu.test_attention import buffer_of, flash
from tests.gpu.test_step import REASSIGNING, Graph, Layer, groups_of
from tests.method.definition import BLOCK_SIZE, CONFIG, REQUESTS
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.kernels.layer_cache import LayerCache

POISON = [float("nan"), float("inf"), float("-inf")]


def layer_of(requests, way: str, method=CONFIG) -> Layer:
    layer = Layer(requests, (6, 2), method=method)
    sdpa = way == "sdpa"
    layer.attention = SdpaAttention(buffer_of(layer, lines=3)) if sdpa else flash(layer, way)
    return layer


def poison(tensor: torch.Tensor) -> None:
    for i, value in enumerate(POISON):
        tensor.view(-1)[i::3] = value


def poison_what_no_request_wrote(layer: Layer, requests) -> None:
    """All of the cache but the requests' tokens, the workspace, and the buffers to gather into."""
    pages = layer.cache.pages
    written = torch.zeros(pages.shape[0], BLOCK_SIZE, dtype=torch.bool)
    for line, (_, end, _) in zip(layer.block_table, requests, strict=True):
        position = torch.arange(end)
        written[line[position // BLOCK_SIZE].long(), position % BLOCK_SIZE] = True
    unwritten = ~written[:, None, None, :, None].expand(pages.shape).to(pages.device)
    garbage = torch.empty(pages.shape, device=pages.device)
    poison(garbage)
    # `where` may give other strides; the cache keeps those of vLLM.
    pages.copy_(torch.where(unwritten, garbage.to(pages.dtype), pages))
    workspace = layer.workspace
    scoring = (workspace.mean_queries, workspace.parts, workspace.scores)
    for tensor in (*scoring, workspace.rotated_queries, *buffers_of(layer)):
        poison(tensor)
    # Slots of a block that is nobody's, and lengths of rows that there are not.
    workspace.slots.zero_()
    workspace.lengths.fill_(1 << 20)
    for tensor in vars(workspace.table_scratch).values():
        tensor.fill_(1 << 14)


def buffers_of(layer: Layer) -> list[torch.Tensor]:
    buffer = getattr(layer.attention, "buffer", None)
    return [] if buffer is None else [buffer.keys, buffer.values]


def clean(layer: Layer) -> None:
    workspace = layer.workspace
    counts = vars(workspace.table_scratch).values()
    for tensor in (workspace.scores, workspace.parts, *counts, *buffers_of(layer)):
        tensor.zero_()


@pytest.mark.parametrize("way", ["sdpa", "3 in place", "3 gathered"])
def test_a_step_says_the_same_bits_whatever_lay_there_before(way: str):
    requests = [(96, 150, 190), (99, 100, 50), (0, 40, 40)]
    layer = layer_of(requests, way)
    clean(layer)
    expected = layer.run(groups_of(requests, layer))
    poison_what_no_request_wrote(layer, requests)
    out = layer.run(groups_of(requests, layer))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("way", ["sdpa", "4 gathered"])
def test_keys_that_are_rotated_on_their_way_bring_nothing_along(way: str):
    requests = REQUESTS["decode"]
    layer = layer_of(requests, way, REASSIGNING)
    clean(layer)
    expected = layer.run(groups_of(requests, layer))
    poison_what_no_request_wrote(layer, requests)
    assert torch.equal(layer.run(groups_of(requests, layer)), expected)


def test_a_quantized_cache_brings_nothing_along():
    requests = REQUESTS["decode"]
    layer = layer_of(requests, "3 gathered")
    scales = [torch.tensor([s]) for s in (0.5, 1.5)]
    layer.cache = LayerCache(layer.cache.pages.to(torch.float8_e5m2), *scales)
    clean(layer)
    expected = layer.run(groups_of(requests, layer))
    poison_what_no_request_wrote(layer, requests)
    assert torch.equal(layer.run(groups_of(requests, layer)), expected)


@pytest.mark.parametrize("way", ["sdpa", "3 in place", "2 gathered", "3 gathered"])
def test_a_request_of_nothing_but_nans_changes_nobody_else(way: str):
    # The last of a captured step's rows are padded.
    requests = [(199, 200, 100), (150, 151, 100), (45, 46, 45), (30, 31, 20)]
    layer = layer_of(requests, way)
    layer.query = torch.cat([layer.query, layer.query])
    clean(layer)
    graph = Graph(layer, num_tokens=8, queries=1)
    expected = graph.replay(requests)[1:4]
    (group,) = graph.captured
    table = layer.workspace.table_of(group)
    lengths, slots = table.lengths.clone(), table.slots.clone()
    blocks = layer.block_table[0].long()
    layer.cache.pages[blocks] = float("nan")
    layer.query[0] = float("nan")
    for _ in range(2):  # the second finds what the first left behind
        out = graph.replay(requests)
        assert torch.equal(out[1:4], expected)
        assert torch.equal(table.lengths[:4], lengths[:4])
        for row in range(1, 4):
            own = slice(int(lengths[row]))
            assert torch.equal(table.slots[row, own], slots[row, own])
        selected = table.slots[0, : int(lengths[0])]
        assert set((selected // BLOCK_SIZE).tolist()) <= set(blocks.tolist())
    assert out[0].isnan().all()


def test_a_padded_row_is_no_nan_where_pytorch_attends():
    requests = [(150, 151, 100)]
    layer = layer_of(requests, "sdpa")
    layer.query = torch.cat([layer.query] * 3)
    poison_what_no_request_wrote(layer, requests)
    assert Graph(layer, num_tokens=3, queries=1).replay(requests).isfinite().all()
