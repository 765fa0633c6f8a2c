"""Every library's attention over the sparse block table is that of the definition."""

import pytest
import torch

from tests.gpu.test_step import REASSIGNING, Graph, Layer, groups_of
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import CONFIG, HEAD_SIZE, REQUESTS
from vllm_tokenselect.gpu.attention import PAGE_TOKENS, GatherBuffer
from vllm_tokenselect.gpu.flash_attention import (
    GatheredFlashAttention,
    PagedFlashAttention,
    single_token_pages,
)
from vllm_tokenselect.method import Method


def defined_varlen(
    q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, block_table, out, **options
):
    """What `flash_attn_varlen_func` documents, for a paged cache and the mask to the lower right."""
    assert options["causal"]
    page, group = k.shape[1], q.shape[1] // k.shape[2]
    for line, length in enumerate(seqused_k.tolist()):
        start, end = cu_seqlens_q[line : line + 2].tolist()
        assert end - start <= max_seqlen_q
        assert length <= max_seqlen_k <= block_table.shape[1] * page
        position = torch.arange(length, device=q.device)
        pages = block_table[line, position // page].long()
        keys, values = (x[pages, position % page].repeat_interleave(group, 1) for x in (k, v))
        visible = torch.ones(end - start, length, dtype=torch.bool, device=q.device)
        logits = torch.einsum("nhd,mhd->hnm", q[start:end], keys) * options["softmax_scale"]
        hidden = ~visible.tril(length - (end - start))
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hnm,mhd->nhd", weights, values)


def buffer_of(layer: Layer, lines: int | None = None) -> GatherBuffer:
    num_kv_heads = layer.cache.pages.shape[1]
    dtype, device = layer.cache.pages.dtype, torch.device(DEVICE)
    buffer = GatherBuffer(num_kv_heads, HEAD_SIZE, dtype, CONFIG.max_attended, device)
    if lines:
        buffer.keys, buffer.values = buffer.keys[:lines], buffer.values[:lines]
    return buffer


def flash(layer: Layer, kind: str):
    if kind == "in place":
        return PagedFlashAttention(defined_varlen)
    return GatheredFlashAttention(defined_varlen, 2, buffer_of(layer, lines=3))


@pytest.mark.parametrize("kind", ["in place", "gathered"])
@pytest.mark.parametrize("name", REQUESTS)
def test_flash_attention_gets_the_rows_of_the_table(name: str, kind: str):
    assert_attends(name, (6, 2), CONFIG, kind)


def test_flash_attention_gets_the_rows_of_the_table_at_reassigned_positions():
    assert_attends("mixed", (4, 1), REASSIGNING, "gathered")


def assert_attends(name: str, heads: tuple[int, int], method: Method, kind: str) -> None:
    requests = REQUESTS[name]
    layer = Layer(requests, heads, method=method)
    layer.attention = flash(layer, kind)
    out = layer.run(groups_of(requests, layer))
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["in place", "gathered"])
def test_flash_attention_gets_the_rows_of_a_captured_step_of_three_tokens_a_request(kind: str):
    requests = [(150, 153, 100), (30, 33, 20)]
    layer = Layer(requests, (6, 2))
    layer.query = torch.cat([layer.query, layer.query[:3]])  # a padded request
    layer.attention = flash(layer, kind)
    out = Graph(layer, num_tokens=9, queries=3).replay(requests)[:6]
    layer.query = layer.query[:6]
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)


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
