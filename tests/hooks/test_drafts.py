"""Which drafts are served; a draft model keeps to vLLM's own backends, on both model runners."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from torch import nn
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import replace
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_tokenselect.config import SettingsError
from vllm_tokenselect.hooks import drafts, engine_config, layer_backends
from vllm_tokenselect.hooks.engine_config import configure
from vllm_tokenselect.hooks.registration import backend_member


@pytest.fixture
def drafting(make_vllm_config, monkeypatch) -> Any:
    """The checked configuration of an engine on TOKENSELECT, for which a model of its own kind drafts."""
    name = "check_and_update_config"
    monkeypatch.setattr(CpuPlatform, name, CpuPlatform.__dict__[name])  # put back what is wrapped
    engine_config.install(CpuPlatform)
    config = make_vllm_config(max_num_batched_tokens=128)
    config.attention_config.backend = backend_member()
    config.speculative_config = speculative(config)
    configure(config, "cpu")
    return config


def speculative(config: Any, **options: Any) -> SpeculativeConfig:
    target = config.model_config
    return SpeculativeConfig(
        model=target.model,
        target_model_config=target,
        target_parallel_config=ParallelConfig(),
        **{"method": "draft_model", "num_speculative_tokens": 2} | options,
    )


@pytest.mark.parametrize("method", ["medusa", "dflash", "ngram_gpu", "extract_hidden_states"])
def test_a_method_that_is_not_served_is_refused_by_name(method):
    with pytest.raises(SettingsError, match=f"the method '{method}' .*served are .*eagle3, mtp"):
        drafts.check_drafts(SimpleNamespace(method=method))


def test_drafts_on_tokenselect_are_refused_and_on_other_backends_served(make_vllm_config):
    config = make_vllm_config()
    with pytest.raises(SettingsError, match="attention_backend=TOKENSELECT cannot be used"):
        drafts.check_drafts(speculative(config, attention_backend=backend_member()))
    drafts.check_drafts(speculative(config, attention_backend="CPU_ATTN"))
    drafts.check_drafts(speculative(config))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"parallel_drafting": True}, "parallel_drafting"),
        ({"use_gemma4_mtp": lambda: True}, "the MTP layers of Gemma 4"),
        ({"use_multi_module_mtp": lambda: True}, "MTP of several modules"),
    ],
)
def test_a_kind_of_draft_that_is_not_served_is_refused_by_name(changed, named):
    kind = {"method": "mtp", "attention_backend": None, "parallel_drafting": False}
    kind |= dict.fromkeys(("use_gemma4_mtp", "use_multi_module_mtp"), lambda: False)
    drafts.check_drafts(SimpleNamespace(**kind))
    with pytest.raises(SettingsError, match=named):
        drafts.check_drafts(SimpleNamespace(**kind | changed))


def test_drafts_for_a_hybrid_model_on_a_cpu_are_refused_where_vllm_cannot_copy_its_states(
    monkeypatch,
):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    hybrid = SimpleNamespace(is_hybrid=True)
    config = SimpleNamespace(model_config=hybrid, speculative_config=SimpleNamespace())
    config.cache_config = SimpleNamespace(mamba_cache_mode="align")
    with pytest.raises(SettingsError, match="Add --no-enable-prefix-caching, or leave out"):
        drafts.check_states(config, "cpu")
    drafts.check_states(config, "cuda")
    config.cache_config.mamba_cache_mode = "none"
    drafts.check_states(config, "cpu")
    config.cache_config.mamba_cache_mode, hybrid.is_hybrid = "align", False
    drafts.check_states(config, "cpu")
    hybrid.is_hybrid, config.speculative_config = True, None
    drafts.check_states(config, "cpu")


def of_runner_v1(config: Any) -> tuple[Any, Any]:
    """What Model Runner V1 makes an EAGLE head with: no backend, and the model of the head apart."""
    own = replace(config.attention_config, backend=config.speculative_config.attention_backend)
    draft = replace(config, attention_config=own)
    return draft, config.speculative_config.draft_model_config


def of_runner_v2(config: Any) -> tuple[Any, Any]:
    """What Model Runner V2 makes a draft model with: the target's backends."""
    model = config.speculative_config.draft_model_config
    return replace(config, model_config=model), None


@pytest.mark.parametrize("runner", [of_runner_v1, of_runner_v2])
def test_the_configuration_of_a_draft_passes_vllms_checks_unseen(
    drafting, runner, caplog, monkeypatch
):
    """vLLM checks it again; the target's settings say nothing of it."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    target = ModelConfig(
        model=drafting.model_config.model,
        skip_tokenizer_init=True,
        hf_overrides={"num_hidden_layers": 3},
    )
    drafting.model_config = target
    drafting.speculative_config.target_model_config = target
    settings = {**drafting.additional_config["tokenselect"], "dense_layers": 2}
    drafting.additional_config = {"tokenselect": settings}
    runner(drafting)  # the draft has one layer, and could not have two dense ones
    assert "not used" not in caplog.text


@pytest.mark.parametrize("runner", [of_runner_v1, of_runner_v2])
@pytest.mark.parametrize("chosen", [None, AttentionBackendEnum.CPU_ATTN])
def test_a_draft_is_made_on_the_backend_that_was_chosen_for_drafts(drafting, runner, chosen):
    drafting.attention_config.backend_per_kind = {
        "full_attention": backend_member(),
        "sliding_window": AttentionBackendEnum.CPU_ATTN,
    }
    drafting.speculative_config.attention_backend = chosen
    config, model_config = runner(drafting)
    assert drafts.is_draft(config, model_config)
    changed = drafts.config_of(config, model_config)
    assert changed.attention_config.backend is chosen
    assert [*changed.attention_config.backend_per_kind] == ["sliding_window"]
    # Layers register here, and the target's configuration stays.
    assert changed.compilation_config is drafting.compilation_config
    assert drafting.attention_config.backend is backend_member()


def test_the_target_and_engines_on_other_backends_are_left_alone(drafting, make_vllm_config):
    assert drafts.config_of(drafting) is drafting
    assert drafts.config_of(drafting, drafting.model_config) is drafting
    other = make_vllm_config()
    other.speculative_config = copy.copy(drafting.speculative_config)
    model = other.speculative_config.draft_model_config
    assert drafts.config_of(other, model) is other


def test_a_draft_whose_layers_are_of_another_kind_is_refused_by_name(drafting):
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Latent(nn.Module, AttentionLayerBase):
        get_attn_backend = get_kv_cache_spec = None

    draft = nn.Sequential()
    draft.add_module("0", Latent())
    model = drafting.speculative_config.draft_model_config
    with pytest.raises(SettingsError, match="Sequential, whose layer 0 is Latent"):
        layer_backends.settle_layers(draft, drafting, model)
    layer_backends.settle_layers(nn.Linear(1, 1), drafting, model)
