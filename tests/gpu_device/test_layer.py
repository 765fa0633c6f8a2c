"""A decoding layer on the device: replayed, without waiting, and by each library for attention."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from tests.gpu_device.cases import DEVICE, ON_GPU, Shape, assert_close, decoding_layer
from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.gpu.plain_attention import PlainAttention
from vllm_tokenselect.kernels.attend import reference
from vllm_tokenselect.kernels.attend.gpu import AttendScratch
from vllm_tokenselect.method.settings import Method

pytestmark = pytest.mark.gpu

LIBRARIES = (
    "own kernel",
    "plain PyTorch",
    "FlashAttention 3 in place",
    *(f"FlashAttention {version} gathered" for version in (2, 3, 4)),
)
GPT_OSS, GEMMA_2 = Shape("gpt-oss", 64, 8, 64), Shape("Gemma 2 9B", 16, 8, 256)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_graph_replayed_with_other_queries_says_what_launching_says():
    layer = decoding_layer()
    layer.run(0)
    replay: Callable[[], object] = partial(layer.run, 0)
    if ON_GPU:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.run(0)
        replay = graph.replay
    layer.data.query.normal_()
    layer.run(0)
    expected = layer.data.out.clone()
    layer.data.out.fill_(float("nan"))
    replay()
    assert_close(layer.data.out, expected, 1e-6)


def test_a_decoding_step_does_not_wait_for_the_device():
    """Neither to cut the step into rows nor to run its layers."""
    layer = decoding_layer()
    layer.run(0)
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        layer.write_rows()
        layer.run(0)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


def make_attention(library: str, shape: Shape, soft_cap: float, method: Method) -> RowAttention:
    """A way to attend that takes sinks, and the soft cap; 0 is none. Skips what is not here."""
    heads = shape.num_kv_heads, shape.head_size
    buffer = GatherBuffer(*heads, torch.bfloat16, method.max_attended, DEVICE)
    plain = PlainAttention(buffer, soft_cap)
    if library == "plain PyTorch":
        return plain
    if library == "own kernel":
        width = max(method.max_attended, method.min_context)
        scratch = AttendScratch(8, width, shape.num_heads, *heads, DEVICE)
        return DecodingAttention(plain, scratch, soft_cap=soft_cap)
    if not ON_GPU or find_spec("vllm") is None:
        pytest.skip("FlashAttention needs a GPU and vLLM")
    from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported

    version = int(library.split()[1])
    if not is_fa_version_supported(version):
        pytest.skip("it is not for this GPU")
    if version == 4 and shape.head_size > 128:
        pytest.skip("it has no soft cap for heads of this size")
    if library.endswith("in place"):
        return PagedFlashAttention(flash_attn_varlen_func, soft_cap)
    return GatheredFlashAttention(flash_attn_varlen_func, version, buffer, soft_cap)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("shape", "soft_cap"),
    [(GPT_OSS, 0.0), (GEMMA_2, 2.0)],
    ids=["sinks of gpt-oss", "soft cap of Gemma 2 9B"],
)
def test_sinks_and_soft_caps(shape, soft_cap, library):
    sinks = None
    if not soft_cap:
        sinks = torch.linspace(-2, 6, shape.num_heads, device=DEVICE).bfloat16()
    layer = decoding_layer(shape)
    layer.attention = make_attention(library, shape, soft_cap, layer.method)
    layer.cache = replace(layer.cache, sinks=sinks)
    layer.run(0)
    (group,) = layer.steps[0].groups
    expected, table = torch.empty_like(layer.data.out), layer.workspace.table_of(group)
    reference.attend(
        layer.data.query,
        group.query_start_loc,
        layer.cache.pages,
        table.slots,
        table.lengths,
        layer.data.work.shape.scale,
        expected,
        sinks=sinks,
        soft_cap=soft_cap,
    )
    assert_close(layer.data.out, expected, 1e-2)
