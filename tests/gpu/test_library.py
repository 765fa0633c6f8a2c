"""Which attention a layer gets: what changes keys on their way gathers them first."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.selector import AttentionSelectorConfig

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.test_layouts import GPUS, on_gpu
from tests.kernels_gpu.cases import DEVICE
from vllm_tokenselect.backend import TokenSelectBackend, gpu_attention
from vllm_tokenselect.backend.gpu_attention import LayerShape
from vllm_tokenselect.engine import gpu_libraries
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.gpu.plain_attention import PlainAttention
from vllm_tokenselect.method.settings import Method, SettingsError


def shape_of(library: str, dtype: torch.dtype, positions: str = "native") -> LayerShape:
    method = Method(
        top_k=64, n_init=16, n_local=16, query_chunk=32, refresh_interval=16, positions=positions
    )
    assert method.max_attended == 128
    return LayerShape(
        limits=StepLimits(
            method, num_heads=4, num_kv_heads=2, max_model_len=128, workspace_bytes=1 << 20
        ),
        library=library,
        head_size=64,
        dtype=dtype,
        fp8_dtype=None,
        block_size=16,
        device=torch.device(DEVICE),
        heads=None,
    )


@pytest.mark.parametrize(
    ("quantized", "reassigned", "kind", "said"),
    [
        (False, False, PagedFlashAttention, "through the sparse block table: 0 MiB of buffers"),
        (True, False, GatheredFlashAttention, "over gathered tokens: 256 MiB of buffers"),
        (
            False,
            True,
            GatheredFlashAttention,
            "over gathered tokens, positions reassigned: 256 MiB of buffers",
        ),
    ],
)
def test_only_keys_that_are_attended_as_they_are_cached_are_read_in_place(
    quantized, reassigned, kind, said, monkeypatch
):
    lines: list[str] = []
    log = SimpleNamespace(info=lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(gpu_attention, "get_logger", lambda name: log)
    monkeypatch.setattr(gpu_libraries, "get_flash_attn_version", lambda head_size: 3)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", FlashAttentionModel(3), raising=False)
    shape = replace(
        shape_of("flash", torch.bfloat16, "reassigned" if reassigned else "native"),
        fp8_dtype=torch.float8_e4m3fn if quantized else None,
    )
    attention = gpu_attention.make_attention(shape)
    assert type(attention) is kind
    name, scratch = "FlashAttention 3", "up to 64 MiB of partial outputs"
    assert lines == [f"TOKENSELECT attends with {name}, {said}, {scratch}"]


def test_the_own_kernel_decodes_beside_any_library(monkeypatch):
    lines: list[str] = []
    log = SimpleNamespace(info=lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(gpu_attention, "get_logger", lambda name: log)
    shape = replace(shape_of("sdpa", torch.float32), few_queries=11)
    attention = gpu_attention.make_attention(shape)
    assert isinstance(attention, DecodingAttention)
    assert type(attention.library) is SdpaAttention
    assert attention.few == 11
    assert "attends with sdpa, over gathered tokens" in lines[0]
    # 128 tokens are one split: 512 rows of 4 heads, 64 weighted values and two numbers each.
    assert attention.scratch.num_bytes == 512 * 4 * (4 * 66 + 2)
    assert attention.buffer_bytes == attention.library.buffer_bytes + attention.scratch.num_bytes
    assert (
        "attends rows of up to 11 queries, as in decoding, with its own kernel: 0 MiB" in lines[1]
    )
    again = gpu_attention.make_attention(shape, padded=True)
    assert again.scratch is attention.scratch


@pytest.mark.parametrize(
    ("asked", "reason"),
    [({"has_sinks": True}, "has no attention sinks"), ({"soft_cap": 50.0}, "no logits soft cap")],
)
def test_sinks_and_soft_caps_keep_xformers_away(asked, reason, monkeypatch):
    monkeypatch.setattr(gpu_libraries, "get_flash_attn_version", lambda head_size: None)
    monkeypatch.setattr(gpu_libraries, "find_spec", lambda name: name)
    kind = (64, torch.bfloat16)
    assert gpu_libraries.choose_library("auto", *kind) == "xformers"
    assert gpu_libraries.choose_library("auto", *kind, **asked) == "sdpa"
    with pytest.raises(
        SettingsError, match=f"attention='xformers' cannot be used: xformers .*{reason}"
    ):
        gpu_libraries.choose_library("xformers", *kind, **asked)


@pytest.mark.parametrize("asked", [{"has_sinks": True}, {"soft_cap": 50.0}])
def test_what_sdpa_does_not_have_is_attended_by_plain_operations(asked, monkeypatch):
    lines: list[str] = []
    log = SimpleNamespace(info=lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(gpu_attention, "get_logger", lambda name: log)
    attention = gpu_attention.make_attention(replace(shape_of("sdpa", torch.float32), **asked))
    assert isinstance(attention, PlainAttention)
    assert "PyTorch's plain operations, over gathered tokens: " in lines[0]


@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_vllm_may_choose_tokenselect_for_layers_with_sinks(capability, monkeypatch):
    on_gpu(capability, monkeypatch)
    asked = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "has_sink": True}
    kind = asked | {"block_size": 16, "use_mla": False, "attn_type": AttentionType.DECODER}
    layer = AttentionSelectorConfig(**kind)
    gpu = DeviceCapability(*capability)
    found = TokenSelectBackend.validate_configuration(device_capability=gpu, **layer._asdict())
    assert found == []


def test_a_head_size_that_no_library_has_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    backend = (torch.bfloat16, "auto", 16, False, False, False, False, DeviceCapability(9, 0))
    assert "heads have 576 elements" in TokenSelectBackend.supports_combination(576, *backend)
    for size in (256, 512):
        assert TokenSelectBackend.supports_combination(size, *backend) is None


@pytest.mark.parametrize(
    ("version", "library"), [(2, "sdpa"), (3, "sdpa"), (4, "flash"), (None, "sdpa")]
)
def test_large_heads_go_to_a_library_that_takes_them(version, library, monkeypatch):
    """FlashAttention 2, of GPUs before Hopper and of Blackwell's large heads, ends at 256."""
    monkeypatch.setattr(gpu_libraries, "get_flash_attn_version", lambda head_size: version)
    monkeypatch.setattr(gpu_libraries, "find_spec", lambda name: "xformers is installed")
    assert gpu_libraries.choose_library("auto", 512, torch.bfloat16) == library
    for asked in {"flash", "xformers"} - {library}:
        with pytest.raises(SettingsError, match=f"attention='{asked}' cannot be used"):
            gpu_libraries.choose_library(asked, 512, torch.bfloat16)


def test_full_attention_is_not_served_at_reassigned_positions():
    settings = {"tokenselect": {"positions": "reassigned"}}
    answer = gpu_libraries.serves_full_attention(SimpleNamespace(additional_config=settings))
    assert answer.startswith("positions are reassigned")
