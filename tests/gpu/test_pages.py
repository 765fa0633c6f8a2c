"""A layer on a GPU reads the pages of its KV cache however vLLM lays them out, padded ones too."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends import fa_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    compute_layout_strides,
    create_kv_cache_views,
)

try:
    from vllm.v1.core.kv_cache_planning import unify_kv_cache_spec_page_size
except ImportError:  # 0.32
    from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_step import Layer, groups_of
from tests.kernels_gpu.cases import DEVICE
from tests.method.definition import BLOCK_SIZE, HEAD_SIZE, REQUESTS, SCALE
from vllm_tokenselect.backend import gpu_attention
from vllm_tokenselect.engine import gpu_libraries
from vllm_tokenselect.gpu.flash_attention import (
    SPLIT_BYTES,
    GatheredFlashAttention,
    PagedFlashAttention,
)
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.method.anchors import Role

HEADS = (6, 2)
SPEC = FullAttentionSpec(
    block_size=BLOCK_SIZE, num_kv_heads=HEADS[1], head_size=HEAD_SIZE, dtype=torch.float32
)
PADDED = replace(SPEC, page_size_padded=SPEC.page_size_bytes + 1024)


class OfPages(AttentionLayerBase):
    """A layer of a model, of which only the pages matter."""

    def __init__(self, spec) -> None:
        self.spec = spec

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def engine_of(*specs) -> SimpleNamespace:
    """As much of vLLM's configuration as knows the layers."""
    layers = {f"layer {i}": OfPages(spec) for i, spec in enumerate(specs)}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """The module of the layers, with what only a GPU has, and the lines that it logs."""
    monkeypatch.setattr(fa_utils, "reshape_and_cache_flash", None, raising=False)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", FlashAttentionModel(3), raising=False)
    monkeypatch.setattr(gpu_libraries, "get_flash_attn_version", lambda head_size: 3)
    lines: list[str] = []
    log = SimpleNamespace(info=lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(gpu_attention, "get_logger", lambda name: log)
    module = importlib.import_module("vllm_tokenselect.backend.gpu_impl")
    for cached in (module._shared, module._gathering, module._compile):
        cached.cache_clear()
    return module, lines


def impl_of(module, layer: Layer, vllm_config, soft_cap: float = 0.0):
    """A layer as it is after loading, on FlashAttention 3."""
    impl = object.__new__(module.GpuTokenSelectImpl)
    device = torch.device(DEVICE)
    impl.shape = gpu_attention.LayerShape(
        limits=layer.limits,
        library="flash",
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        fp8_dtype=None,
        block_size=BLOCK_SIZE,
        device=device,
        heads=None,
        has_sinks=layer.sinks is not None,
        soft_cap=soft_cap,
    )
    impl.workspace, impl.attention = module._shared(impl.shape)
    impl.vllm_config, impl.scale, impl.head_size = vllm_config, SCALE, HEAD_SIZE
    impl.fp8_dtype, impl.selections, impl.rotation = None, None, None
    impl.reassigns_positions, impl.sinks = False, layer.cache.sinks
    impl.follows, impl.followers = Role()
    return impl


def kv_cache_of(layer: Layer, spec, layout: KVCacheLayout) -> torch.Tensor:
    """The second of two layers' caches as vLLM makes it; what is nobody's is NaN."""
    num_blocks = len(layer.kv_cache)
    strides = compute_layout_strides(spec, num_blocks, 2, layout)
    size = 2 * num_blocks * spec.page_size_bytes
    raw = torch.full((size,), -1, dtype=torch.int8, device=DEVICE)
    tensor = KVCacheTensor(size, ["0", "1"], layer_stride=strides[0], block_stride=strides[1])
    view = create_kv_cache_views(raw, spec, num_blocks, layout, tensor)[1]
    view.copy_(layer.kv_cache.movedim(2, 3).flatten(-2))
    return view


def run(impl, layer: Layer, kv_cache: torch.Tensor, requests) -> torch.Tensor:
    step = GpuStep(groups_of(requests, layer), layer.block_table.to(DEVICE))
    query = layer.query.to(DEVICE)
    metadata = SimpleNamespace(step=step)
    return impl.forward(None, query, query, query, kv_cache, metadata, torch.zeros_like(query))


def test_every_layout_is_read(hopper):
    module, _ = hopper
    requests = REQUESTS["decode"]
    layer = Layer(requests, HEADS)
    expected = layer.expected(requests)
    for layout in KVCacheLayout:
        impl = impl_of(module, layer, None)
        out = run(impl, layer, kv_cache_of(layer, SPEC, layout), requests)
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-4, atol=2e-5, msg=layout.name)
        in_place = isinstance(impl.attention, PagedFlashAttention)
        assert in_place == (layout in (KVCacheLayout.LBNHC, KVCacheLayout.LHBNC))


def test_padded_pages_are_gathered_and_the_log_says_so(hopper):
    module, lines = hopper
    requests = REQUESTS["decode"]
    layer = Layer(requests, HEADS)
    impl = impl_of(module, layer, None)
    out = run(impl, layer, kv_cache_of(layer, PADDED, KVCacheLayout.LBNHC), requests)
    torch.testing.assert_close(out.cpu(), layer.expected(requests), rtol=2e-4, atol=2e-5)
    assert isinstance(impl.attention, GatheredFlashAttention)
    assert "over gathered tokens, since pages of the KV cache are padded: 256 MiB" in lines[-1]


def test_a_layers_sinks_are_read_as_it_attends_and_its_soft_cap_is_its_shapes(hopper):
    module, _ = hopper
    requests = REQUESTS["decode"]
    layer = Layer(requests, HEADS, sinks=torch.full((HEADS[0],), float("-inf")))
    impl = impl_of(module, layer, None, soft_cap=0.5)
    for sinks in (layer.sinks, impl.sinks):  # the weights are loaded
        sinks.copy_(torch.linspace(-2, 4, HEADS[0]).bfloat16())
    for spec in (SPEC, PADDED):  # in place, and gathered
        out = run(impl, layer, kv_cache_of(layer, spec, KVCacheLayout.LBNHC), requests)
        torch.testing.assert_close(out.cpu(), layer.expected(requests, 0.5), rtol=2e-4, atol=2e-5)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that was made within."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("neighbor", [SPEC, replace(SPEC, num_kv_heads=3)], ids=["alike", "larger"])
def test_a_profiling_run_sees_what_a_step_will_take(hopper, neighbor):
    module, lines = hopper
    layer = Layer(REQUESTS["decode"], HEADS)
    engine = engine_of(SPEC, neighbor)
    impl = impl_of(module, layer, engine)
    before = len(lines)
    with Allocations() as seen:
        own = engine.compilation_config.static_forward_context["layer 0"]
        impl.forward(own, layer.query, layer.query, layer.query, None, None, layer.query.clone())
    assert seen.largest >= SPLIT_BYTES
    gathers = any("pages of the KV cache are padded" in line for line in lines[before:])
    assert gathers == (neighbor != SPEC)


SLIDING = SlidingWindowSpec(
    block_size=BLOCK_SIZE,
    num_kv_heads=HEADS[1],
    head_size=HEAD_SIZE,
    dtype=torch.float32,
    sliding_window=64,
)


@pytest.mark.parametrize(
    "others",
    [
        [SLIDING],
        [replace(SLIDING, num_kv_heads=4)],
        [replace(SLIDING, num_kv_heads=3)],
        [replace(SLIDING, num_kv_heads=1)],
        [replace(SLIDING, head_size=48), replace(SLIDING, num_kv_heads=8)],
    ],
    ids=["equal", "twice", "half as large again", "half", "several"],
)
def test_padding_is_foreseen_as_vllm_decides_it(others):
    engine = engine_of(SPEC, *others)
    layers = engine.compilation_config.static_forward_context
    specs = {name: layer.spec for name, layer in layers.items()}
    unified = unify_kv_cache_spec_page_size(specs)["layer 0"]
    padded = unified.page_size_padded is not None
    assert gpu_attention.pages_may_be_padded(engine, layers["layer 0"]) == padded


def test_a_quantized_cache_is_read_with_the_scales_of_the_layer_that_wrote_it(hopper):
    """A layer that reads the keys of another comes without scales of its own: they are 1."""
    module, _ = hopper
    impl = object.__new__(module.GpuTokenSelectImpl)
    impl.head_size, impl.fp8_dtype = HEAD_SIZE, torch.float8_e4m3fn
    impl.selections, impl.sinks = None, None
    impl.follows, impl.followers = Role()
    kv_cache = torch.zeros(2, HEADS[1], BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.uint8)
    own, writer = (SimpleNamespace(_k_scale=scale, _v_scale=2 * scale) for scale in (1, 7))
    for impl.writer, scales in ((None, (1, 2)), (writer, (7, 14))):
        cache = impl._cache(own, kv_cache, None)
        assert (cache.key_scale, cache.value_scale) == scales
