"""Full-attention layers run on TOKENSELECT; others stay on vLLM's own backend or are refused."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tokenselect.hooks.platform_backend import choose_backend, install
from vllm_tokenselect.hooks.registration import BACKEND_PATH, backend_member

VLLM_PATH = "vllm.own.OwnBackend"


def layer(**options) -> AttentionSelectorConfig:
    return AttentionSelectorConfig(
        head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=None, **options
    )


@pytest.fixture
def original():
    """vLLM's own `get_attn_backend_cls`, which records how it was called."""

    def get_attn_backend_cls(selected, config, num_heads=None):
        get_attn_backend_cls.calls.append((selected, config, num_heads))
        return VLLM_PATH

    get_attn_backend_cls.calls = []
    return get_attn_backend_cls


@pytest.mark.parametrize("selected", [None, AttentionBackendEnum.CPU_ATTN])
@pytest.mark.parametrize("kind", [{}, {"use_mla": True}, {"has_sliding_window": True}])
def test_when_not_selected_vllm_is_asked_as_it_always_was(selected, kind, original):
    config = layer(**kind)
    assert choose_backend(original, selected, config, 8) == VLLM_PATH
    assert original.calls == [(selected, config, 8)]


def test_full_attention_runs_on_tokenselect(original):
    assert choose_backend(original, backend_member(), layer(), 8) == BACKEND_PATH
    assert original.calls == []


@pytest.mark.parametrize(
    "kind",
    [
        {"has_sliding_window": True},
        {"use_rswa": True},
        {"attn_type": AttentionType.ENCODER},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"attn_type": AttentionType.ENCODER_DECODER},
    ],
    ids=lambda kind: next(iter(kind.values())) if "attn_type" in kind else next(iter(kind)),
)
def test_other_layers_get_the_backend_that_vllm_would_choose_itself(kind, original):
    config = layer(**kind)
    assert choose_backend(original, backend_member(), config, 8) == VLLM_PATH
    assert original.calls == [(None, config, 8)]


@pytest.mark.parametrize("kind", [{"use_mla": True}, {"use_sparse": True}])
def test_latent_and_foreign_sparse_attention_is_refused_by_name(kind, original):
    with pytest.raises(ValueError, match=r"TOKENSELECT cannot serve .*\(MLA\).*Leave out"):
        choose_backend(original, backend_member(), layer(**kind), 8)


def test_a_layer_that_the_backend_cannot_compute_is_refused_with_the_reason(original):
    with pytest.raises(ValueError, match=r"TOKENSELECT cannot serve .*head_size"):
        choose_backend(original, backend_member(), layer()._replace(head_size=48), 8)


def test_the_installed_hook_changes_the_choice_of_tokenselect_only():
    class Platform(CpuPlatform):
        """Wrapped in place of vLLM's, which other tests use."""

    install(Platform)
    wrapped = Platform.get_attn_backend_cls
    install(Platform)
    assert Platform.get_attn_backend_cls == wrapped, "the second call wrapped the wrapper"
    own = AttentionBackendEnum.CPU_ATTN.get_path()
    assert Platform.get_attn_backend_cls(None, layer()) == own
    assert Platform.get_attn_backend_cls(backend_member(), layer()) == BACKEND_PATH
    assert Platform.get_attn_backend_cls(backend_member(), layer(has_sliding_window=True)) == own
