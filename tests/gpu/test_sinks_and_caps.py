"""The sinks of gpt-oss and the soft cap of Gemma 2 take part in the attention, in every library's."""

import pytest
import torch

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_attention import KINDS, buffer_of
from tests.gpu.test_step import Graph, Layer, groups_of, groups_of_rows
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import BLOCK_SIZE, HEAD_SIZE, REQUESTS, SCALE
from vllm_tokenselect.gpu import plain_attention
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.gpu.plain_attention import PlainAttention
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable

LIBRARIES = [*KINDS, "plain"]
CAP = 0.5  # half of all logits are larger
# Unlike, of numbers that bf16 has, and among them what vLLM pads heads with.
SINKS = torch.tensor([3.0, -1.5, 0.25, float("-inf"), 5.0, 1.0])


def library(kind: str, layer: Layer, soft_cap: float):
    if kind == "plain":
        return PlainAttention(buffer_of(layer, lines=3), soft_cap)
    version = int(kind[0])
    varlen = FlashAttentionModel(version)
    if kind.endswith("in place"):
        return PagedFlashAttention(varlen, soft_cap)
    return GatheredFlashAttention(varlen, version, buffer_of(layer, lines=3), soft_cap)


def defined(query, tokens, scale, sinks, soft_cap):
    """Output [n, Hq, D] of a row's queries over tokens [m, Hkv, 2, D]."""
    keys, values = tokens.repeat_interleave(query.shape[1] // tokens.shape[1], 1).unbind(2)
    logits = torch.einsum("nhd,mhd->hnm", query, keys) * scale
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(len(tokens) - len(query))
    weights = logits.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.float().exp()[:, None, None]
    return torch.einsum("hnm,mhd->nhd", weights / total, values)


def assert_attends(kind, requests, heads, sinks, soft_cap) -> None:
    """A library attends to whatever slots it is handed as the definition does."""
    layer = Layer(requests, heads, sinks=sinks)
    attention = library(kind, layer, soft_cap)
    generator = torch.Generator().manual_seed(1)
    for group in groups_of(requests, layer):
        least = group.query_len.cpu()
        lengths = least + torch.randint(1, 40, least.shape, generator=generator, dtype=torch.int32)
        lengths = lengths.clamp(max=group.max_length)
        shape = (group.num_rows, group.table_width)
        num_slots = len(layer.kv_cache) * BLOCK_SIZE
        slots = torch.randint(num_slots, shape, generator=generator, dtype=torch.int32)
        query = layer.query[group.queries]
        out = torch.full_like(query, float("nan"), device=DEVICE)
        table = SparseBlockTable(slots.to(DEVICE), lengths.to(DEVICE))
        attention(query.to(DEVICE), layer.cache, group, table, SCALE, out)
        for row, length in enumerate(lengths.tolist()):
            start = int(group.query_starts[row])
            queries = slice(start, start + int(group.query_lens[row]))
            index = slots[row, :length].long()
            tokens = layer.kv_cache[index // BLOCK_SIZE, :, :, index % BLOCK_SIZE]
            expected = defined(query[queries], tokens, SCALE, sinks, soft_cap)
            torch.testing.assert_close(out[queries].cpu(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "sinks", "soft_cap"),
    [("decode", SINKS, 0.0), ("decode", None, CAP), ("mixed", SINKS, CAP)],
    ids=["sinks", "a cap", "both, long rows"],
)
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_library_attends_with_sinks_and_a_cap(kind, name, sinks, soft_cap):
    assert_attends(kind, REQUESTS[name], (6, 2), sinks, soft_cap)


def test_flash_attention_3_gets_no_sinks_of_more_heads_than_it_holds():
    sinks = torch.linspace(-2, 4, 66).bfloat16().float()
    assert_attends("3 in place", [(150, 153, 100), (99, 100, 50)], (66, 2), sinks, 0.0)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_sinks_of_the_models_dtype_are_read(kind):
    assert_attends(kind, [(30, 32, 30)], (6, 2), SINKS.bfloat16(), 0.0)


def test_plain_attention_in_little_memory_gives_the_same(monkeypatch):
    few = 12 * 128 * 6 * 5 + 8 * 128 * 2 * HEAD_SIZE  # bytes: five queries' logits and a line
    monkeypatch.setattr(plain_attention, "PLAIN_BYTES", few)
    for requests in (REQUESTS["decode"], [(64, 78, 300)]):
        assert_attends("plain", requests, (6, 2), SINKS, CAP)


@pytest.mark.parametrize("kind", ["2 gathered", "plain"])
def test_a_captured_decoding_step_attends_with_sinks_and_a_cap(kind, monkeypatch):
    requests = [(30, 31, 30), (180, 181, 100), (60, 61, 10), (150, 151, 100)]
    layer = Layer(requests, (6, 2), sinks=SINKS)
    groups_of_rows(monkeypatch, layer.limits, 5)
    layer.query = torch.cat([layer.query, layer.query])  # queries of padded requests
    layer.attention = library(kind, layer, CAP)
    out = Graph(layer, num_tokens=8, queries=1).replay(requests)[:4]
    layer.query = layer.query[:4]
    expected = layer.expected(requests, CAP)
    torch.testing.assert_close(out, expected, rtol=2e-4, atol=2e-5)


def test_a_captured_step_of_three_tokens_a_request_attends_with_sinks():
    requests = [(150, 153, 100), (30, 33, 20)]
    layer = Layer(requests, (6, 2), sinks=SINKS)
    layer.query = torch.cat([layer.query, layer.query[:3]])  # a padded request
    layer.attention = library("2 gathered", layer, 0.0)
    out = Graph(layer, num_tokens=9, queries=3).replay(requests)[:6]
    layer.query = layer.query[:6]
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)
