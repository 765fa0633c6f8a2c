"""Speculative decoding: which drafts are served, and the draft model's layers on vLLM's own backends.

A draft model proposes tokens, and the target, on TOKENSELECT, verifies them. What is said is the target's
alone, so drafts keep to vLLM's own backends: `speculative_config.attention_backend`, or vLLM's choice.
Model Runner V2 makes a draft model under the target's configuration, TOKENSELECT included; V1 keeps what is
chosen for one kind of layer. So `layer_backends`, which sees each model being made, asks here for the
configuration of a draft.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks.registration import BACKEND_NAME, is_selected
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import SpeculativeConfig, VllmConfig

SCHEDULERS = "vllm_tokenselect.hooks.scheduler"
WITHOUT_A_MODEL = ("ngram", "suffix")
WITH_A_MODEL = ("draft_model", "eagle", "eagle3", "mtp")


def check_drafts(config: SpeculativeConfig) -> None:
    """Check that drafts come in a way that is served.

    Raises:
        SettingsError: naming the option, with what is allowed.
    """
    if config.method not in (*WITHOUT_A_MODEL, *WITH_A_MODEL):
        served = ", ".join((*WITHOUT_A_MODEL, *WITH_A_MODEL))
        _refuse(f"the method {config.method!r} (served are {served})")
    if config.method in WITHOUT_A_MODEL:
        return
    if getattr(config.attention_backend, "name", config.attention_backend) == BACKEND_NAME:
        raise SettingsError(
            f"--speculative-config attention_backend={BACKEND_NAME} cannot be used: the draft model's "
            "layers keep to vLLM's own backends, and what it proposes is verified on TOKENSELECT. Leave "
            "attention_backend out of --speculative-config, or name another backend there."
        )
    if config.parallel_drafting:
        _refuse("parallel drafting, which proposes all tokens in one pass (parallel_drafting)")
    if config.use_gemma4_mtp():
        _refuse("the MTP layers of Gemma 4, which attend to the keys of the target's layers")
    if config.use_multi_module_mtp():
        _refuse("several modules that each predict a token further (MTP of several modules)")


def check_states(vllm_config: VllmConfig, device: str) -> None:
    """Check that vLLM can keep the states of a hybrid model while drafts are proposed.

    Where prefixes are cached, vLLM copies states with a kernel of Triton, and fails at the first request
    where Triton has no kernels for the device, as on CPUs with PyPI's.

    Raises:
        SettingsError: naming the options.
    """
    from vllm.triton_utils import HAS_TRITON

    model = vllm_config.model_config
    if vllm_config.speculative_config is None or model is None or device != "cpu" or HAS_TRITON:
        return
    if model.is_hybrid and vllm_config.cache_config.mamba_cache_mode == "align":
        raise SettingsError(
            "--speculative-config cannot be used for a hybrid model on a CPU with prefix caching: without "
            "Triton vLLM itself fails at the first request, when it copies states. Add "
            "--no-enable-prefix-caching, or leave out --speculative-config."
        )


def _refuse(what: str) -> NoReturn:
    raise SettingsError(
        f"TOKENSELECT does not support {what} for drafts (--speculative-config). Leave it out, or leave "
        "out --attention-backend TOKENSELECT."
    )


def is_draft(vllm_config: VllmConfig, model_config: Any = None) -> bool:
    """Whether a draft model of an engine on TOKENSELECT is to be made.

    Model Runner V1 leaves TOKENSELECT out of the configuration that it makes a draft model with; the
    engine's scheduler stays.

    Args:
        vllm_config: that the model is made with.
        model_config: of the model, where it is not the configuration's own.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in WITH_A_MODEL or not is_ours(vllm_config):
        return False
    return (model_config or vllm_config.model_config) is speculative.draft_model_config


def is_ours(vllm_config: VllmConfig) -> bool:
    """Whether the scheduler of an engine has been chosen by `engine_config`."""
    chosen = vllm_config.scheduler_config.scheduler_cls
    path = chosen if isinstance(chosen, str) else getattr(chosen, "__module__", "")
    return path.startswith(f"{SCHEDULERS}.") or path == SCHEDULERS


def is_of_draft(vllm_config: VllmConfig) -> bool:
    """Whether a model runner has made the configuration, for a draft model, out of one that was checked.

    vLLM has each configuration checked, those too that it changes for a draft. It would be refused for what
    the target's settings ask of the target's layers.
    """
    if vllm_config.speculative_config is None or not is_ours(vllm_config):
        return False
    return is_draft(vllm_config) or not is_selected(vllm_config.attention_config)


def config_of(vllm_config: VllmConfig, model_config: Any = None) -> VllmConfig:
    """The configuration that a model is to be made with: a draft's has its own backends.

    All else is shared with the one that is given, so that a layer registers where vLLM looks for it.
    """
    if not is_draft(vllm_config, model_config):
        return vllm_config
    changed, attention = copy.copy(vllm_config), copy.copy(vllm_config.attention_config)
    attention.backend = vllm_config.speculative_config.attention_backend
    attention.backend_per_kind = {
        kind: backend
        for kind, backend in attention.backend_per_kind.items()
        if backend.name != BACKEND_NAME
    }
    changed.attention_config = attention
    return changed


def check_layers(draft: nn.Module) -> None:
    """Check the layers of a draft model that was just made, and log what they run on.

    Raises:
        SettingsError: for layers that have no keys and values of their own for each token.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionType

    layers = {
        n: layer for n, layer in draft.named_modules() if isinstance(layer, AttentionLayerBase)
    }
    for name, layer in layers.items():
        if not isinstance(layer, Attention) or layer.attn_type != AttentionType.DECODER:
            _refuse(f"{type(draft).__name__}, whose layer {name} is {type(layer).__name__},")
    backends = sorted({layer.get_attn_backend().get_name() for layer in layers.values()})
    get_logger(__name__).info(
        "TOKENSELECT verifies what %s proposes, whose %d attention layers run on %s",
        *(type(draft).__name__, len(layers), " and ".join(backends)),
    )
