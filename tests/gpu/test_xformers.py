"""xformers gets the rows of the table, with a mask that says what the definition says."""

import pytest
import torch

pytest.importorskip("xformers.ops")  # not on every machine with a GPU

from tests.gpu.test_attention import buffer_of
from tests.gpu.test_step import REASSIGNING, Layer, groups_of
from tests.method.definition import CONFIG, REQUESTS
from vllm_tokenselect.gpu import xformers
from vllm_tokenselect.method.settings import Method


def defined_attention(query, keys, values, attn_bias, scale):
    """Attention of [1, tokens, KV heads, group, D] under xformers' own reading of its mask.

    Kernels read the lengths from the device, `materialize` reads those of the host.
    """
    attn_bias.k_seqinfo.seqlen_py = attn_bias.k_seqinfo.seqlen.tolist()
    bias = attn_bias.materialize((query.shape[1], keys.shape[1]), device=query.device)
    logits = torch.einsum("bnhgd,bmhgd->bhgnm", query * scale, keys) + bias
    return torch.einsum("bhgnm,bmhgd->bnhgd", logits.softmax(-1), values)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, CONFIG) for name in REQUESTS), ("chunked", REASSIGNING)],
    ids=[*REQUESTS, "chunked, reassigned"],
)
def test_xformers_gets_the_rows_of_the_table(
    name: str, method: Method, monkeypatch: pytest.MonkeyPatch
):
    if not torch.cuda.is_available():  # it has no kernel for CPUs
        monkeypatch.setattr(xformers, "memory_efficient_attention_forward", defined_attention)
    requests = REQUESTS[name]
    layer = Layer(requests, (6, 2), method=method)
    layer.attention = xformers.XformersAttention(buffer_of(layer, lines=3))
    out = layer.run(groups_of(requests, layer))
    torch.testing.assert_close(out, layer.expected(requests), rtol=2e-4, atol=2e-5)
