"""Every library's attention over the sparse block table is that of the definition."""

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.flash_model import FlashAttentionModel, require
from tests.gpu.test_step import REASSIGNING, Graph, Layer, groups_of, groups_of_rows
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import CONFIG, HEAD_SIZE, REQUESTS
from vllm_tokenselect.gpu.attention import PAGE_TOKENS, GatherBuffer
from vllm_tokenselect.gpu.flash_attention import (
    GatheredFlashAttention,
    PagedFlashAttention,
    single_token_pages,
)
from vllm_tokenselect.method.settings import Method


def buffer_of(layer: Layer, lines: int | None = None) -> GatherBuffer:
    num_kv_heads = layer.cache.pages.shape[1]
    dtype, device = layer.cache.pages.dtype, torch.device(DEVICE)
    buffer = GatherBuffer(num_kv_heads, HEAD_SIZE, dtype, CONFIG.max_attended, device)
    if lines:
        buffer.keys, buffer.values = buffer.keys[:lines], buffer.values[:lines]
    return buffer


KINDS = ["3 in place", "2 gathered", "3 gathered", "4 gathered"]


def flash(layer: Layer, kind: str):
    """FlashAttention of a version, in place or over gathered tokens of three rows at a time."""
    version, where = int(kind[0]), kind[2:]
    if where == "in place":
        return PagedFlashAttention(FlashAttentionModel(version))
    return GatheredFlashAttention(FlashAttentionModel(version), version, buffer_of(layer, lines=3))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in REQUESTS for kind in KINDS[:2]),
        *(("mixed", k) for k in KINDS[2:]),
    ],
)
def test_flash_attention_gets_the_rows_of_the_table(name: str, kind: str):
    assert_attends(name, (6, 2), CONFIG, kind)


def test_flash_attention_gets_the_rows_of_the_table_at_reassigned_positions():
    assert_attends("mixed", (4, 1), REASSIGNING, "2 gathered")


def assert_attends(name: str, heads: tuple[int, int], method: Method, kind: str) -> None:
    requests = REQUESTS[name]
    layer = Layer(requests, heads, method=method)
    layer.attention = flash(layer, kind)
    out = layer.run(groups_of(requests, layer))
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(6, 2), (2, 2)], ids=["6 heads share 2", "2 heads"])
def test_flash_attention_gets_the_rows_of_a_captured_decoding_step(kind: str, heads, monkeypatch):
    requests = [(30, 31, 30), (180, 181, 100), (60, 61, 10), (150, 151, 100)]
    layer = Layer(requests, heads)
    groups_of_rows(monkeypatch, layer.limits, 5)
    layer.query = torch.cat([layer.query, layer.query])  # queries of padded requests
    layer.attention = flash(layer, kind)
    graph = Graph(layer, num_tokens=8, queries=1)
    assert [group.num_rows for group in graph.captured] == [5, 3]
    out = graph.replay(requests)[:4]
    layer.query = layer.query[:4]
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_flash_attention_gets_the_rows_of_a_captured_step_of_three_tokens_a_request(kind: str):
    requests = [(150, 153, 100), (30, 33, 20)]
    layer = Layer(requests, (6, 2))
    layer.query = torch.cat([layer.query, layer.query[:3]])  # a padded request
    layer.attention = flash(layer, kind)
    out = Graph(layer, num_tokens=9, queries=3).replay(requests)[:6]
    layer.query = layer.query[:6]
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


def test_pytorch_is_asked_for_nothing_that_its_fused_kernels_do_not_do(monkeypatch):
    attend = F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask, scale, **options):
        require(not options, f"no kernel but the one that writes down logits has {options}")
        require(query.shape[:2] == key.shape[:2] == value.shape[:2], "as many heads as keys have")
        return attend(query, key, value, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    requests = [(96, 130, 190), (99, 100, 50)], [(99, 100, 50), (45, 46, 40)]
    for step in requests:
        layer = Layer(step, (6, 2))
        out = layer.run(groups_of(step, layer))
        torch.testing.assert_close(out, layer.expected(step), rtol=2e-4, atol=2e-5)


def test_a_gathered_line_is_whole_pages():
    buffer = GatherBuffer(2, HEAD_SIZE, torch.float16, PAGE_TOKENS + 1, torch.device(DEVICE))
    assert buffer.keys.shape[1] == 2 * PAGE_TOKENS


def test_single_token_pages_are_the_tokens_by_slot():
    pages = torch.randn(5, 16, 3, 2, 8).permute(0, 2, 3, 1, 4)  # heads of a token together
    keys, values = single_token_pages(pages)
    for slot in (0, 15, 16, 79):
        assert torch.equal(keys[slot, 0], pages[slot // 16, :, 0, slot % 16])
        assert torch.equal(values[slot, 0], pages[slot // 16, :, 1, slot % 16])


def test_a_layout_whose_tokens_lie_at_unequal_distances_is_refused():
    pages = torch.randn(5, 3, 16, 2, 8).permute(0, 1, 3, 2, 4)  # tokens of a head together
    with pytest.raises(ValueError, match="cannot be read token by token"):
        single_token_pages(pages)
