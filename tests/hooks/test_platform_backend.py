"""Full-attention layers run on TOKENSELECT; others stay on vLLM's own backend or are refused."""

import inspect
import re

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tokenselect.engine.refusals import refuse_model
from vllm_tokenselect.hooks import platform_backend
from vllm_tokenselect.hooks.platform_backend import choose_backend, install
from vllm_tokenselect.hooks.registration import BACKEND_PATH, backend_member
from vllm_tokenselect.method.settings import SettingsError

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


@pytest.mark.parametrize("has_sink", [False, True])
def test_full_attention_runs_on_tokenselect(original, has_sink):
    assert choose_backend(original, backend_member(), layer(has_sink=has_sink), 8) == BACKEND_PATH
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"use_mla": True}, r"multi-head latent attention \(MLA\)"),
        ({"use_sparse": True}, "a sparse attention of their own"),
        ({"use_mm_prefix": True}, "--language-model-only serves its text alone"),
        ({"use_non_causal": True}, "its attention is not causal"),
        ({"head_size": 48}, "its head size is 48, which is none of 32, 64"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is none of auto, float32"),
        ({"block_size": 24}, "--block-size 24 is not a multiple of 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_is_refused_in_words(option, words, original):
    wanted = f"TOKENSELECT cannot serve this model: [^;]*{words}.*Leave out --attention-backend"
    with pytest.raises(SettingsError, match=wanted) as refusal:
        choose_backend(original, backend_member(), layer()._replace(**option), 8)
    assert "AttentionSelectorConfig" not in str(refusal.value)


def test_everything_that_vllm_can_object_to_is_put_in_words():
    """Its objections are texts in its source; those of attention that never gets so far are left out."""
    source = inspect.getsource(AttentionBackend.validate_configuration)
    objections = set(re.findall(r'"([^"{]+ not supported)"', source))
    elsewhere = {
        # refused before, or left on vLLM's own backend
        *("MLA not supported", "non-MLA not supported", "sparse not supported"),
        *("non-sparse not supported", "sliding window not supported", "R-SWA not supported"),
        "non-causal MLA attention with DCP not supported",
        "attention sinks not supported",  # computed
        # refused with the engine's configuration
        *("KV connector not supported", "PCP not supported", "DCP not supported"),
    }
    backend, words = backend_member().get_class(), {}
    for objection in objections - elsewhere:
        words[objection] = platform_backend._in_words(objection, layer(), backend, None)
    assert words
    assert not [objection for objection, said in words.items() if said == objection]


def test_a_refusal_names_the_model(make_vllm_config):
    with (
        set_current_vllm_config(make_vllm_config()),
        pytest.raises(SettingsError, match="cannot serve LlamaForCausalLM: it is made of cheese"),
    ):
        refuse_model("it is made of cheese")


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
