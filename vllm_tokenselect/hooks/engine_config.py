"""Check the settings when vLLM has its configuration, and put our scheduler in its place.

Wraps the platform's `check_and_update_config`, which has the last word on a configuration before anything
is started. What cannot be served is thus refused at once, by the name of its option. The scheduler is
chosen through vLLM's public `scheduler_cls`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.config import (
    ADDITIONAL_CONFIG_KEY,
    DEFAULT_WORKSPACE_MB,
    TokenSelectConfig,
)
from vllm_tokenselect.engine import connectors, dense_layers
from vllm_tokenselect.engine.kv_cache import check_kv_cache_dtype
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.step_size import check_steps
from vllm_tokenselect.hooks import metrics, model_length, request_validation
from vllm_tokenselect.hooks.drafts import SCHEDULERS, check_drafts, check_states, is_of_draft
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam, wrap_function
from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.profiles import ProfileModel, resolve_profile

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.platforms.interface import Platform

_WHY = "checks the settings at start and chooses the scheduler that keeps query chunks whole"
_RETIRED_BY = "vLLM lets an attention backend check and change the engine's configuration"

SEAMS = {
    "cpu": Seam(
        name="engine_config",
        module="vllm.platforms.cpu",
        qualname="CpuPlatform.check_and_update_config",
        parameters=("cls", "vllm_config"),
        contains=("scheduler_config.async_scheduling = False",),
        why=_WHY,
        retired_by=_RETIRED_BY,
    ),
    "cuda": Seam(
        name="engine_config",
        module="vllm.platforms.cuda",
        qualname="CudaPlatformBase.check_and_update_config",
        parameters=("cls", "vllm_config"),
        why=_WHY,
        retired_by=_RETIRED_BY,
    ),
}


def configure(vllm_config: VllmConfig, device: str) -> None:
    """Check a vLLM configuration and adapt it; does nothing unless TOKENSELECT is chosen.

    Args:
        device: the platform's `device_name`, since ROCm has the `device_type` "cuda" too.

    Raises:
        SettingsError: for settings or engine features that TOKENSELECT cannot serve.
    """
    additional = vllm_config.additional_config
    if is_of_draft(vllm_config):
        return
    if not is_selected(vllm_config.attention_config):
        if isinstance(additional, dict) and ADDITIONAL_CONFIG_KEY in additional:
            get_logger(__name__).warning_once(
                "tokenselect settings are given but not used: the attention backend is not "
                "TOKENSELECT. Add --attention-backend TOKENSELECT."
            )
        return
    config = TokenSelectConfig.from_additional_config(additional)
    if device not in DEFAULT_WORKSPACE_MB:
        raise SettingsError(
            f"TOKENSELECT has no kernels for the platform {device!r}; it runs on NVIDIA GPUs (extra `gpu`) "
            "and CPUs (extra `cpu`). Leave out --attention-backend TOKENSELECT."
        )
    if device == "cpu" and config.attention != "auto":
        raise SettingsError(
            f"tokenselect attention={config.attention!r} is for GPUs; on a CPU vLLM's own attention "
            "kernel is used. Leave it out."
        )
    refuse_features(vllm_config, device)
    if vllm_config.speculative_config is not None:
        check_drafts(vllm_config.speculative_config)
        check_states(vllm_config, device)
    asked = config.model_fields_set
    if config.profile is not None and vllm_config.model_config is not None:
        config = _by_profile(vllm_config)
    if vllm_config.speculative_config is not None and config.method.reuses_selections:
        config = _without_selection_cache(vllm_config, config, asked)
    connectors.check_connectors(vllm_config, config, device)
    if vllm_config.model_config is None:
        return
    scheduler = vllm_config.scheduler_config
    # vLLM may still change a block size that the user did not set; the metadata builder checks the
    # final one.
    cache = vllm_config.cache_config
    check_steps(config, vllm_config, cache.block_size if cache.user_specified_block_size else 1)
    check_kv_cache_dtype(cache.cache_dtype, vllm_config.model_config.dtype, device)
    dense_layers.check_model(vllm_config.model_config, cache, config)
    model_length.check_trained_length(vllm_config.model_config, config)
    _choose_scheduler(scheduler)
    metrics.serve_counters()
    request_validation.install()
    if device == "cuda":
        from vllm_tokenselect.engine import graph_sizes  # needs Triton

        graph_sizes.limit_engine(vllm_config)
    if device == "cpu":
        # A worker starts bound to one core, and numba, which vLLM's model runner imports, would count
        # one. The workers inherit this number; each then takes as many threads as its PyTorch has.
        os.environ.setdefault("NUMBA_NUM_THREADS", str(os.cpu_count()))


def refuse_features(vllm_config: VllmConfig, device: str) -> None:
    """Check that the engine is asked for nothing that TOKENSELECT cannot do.

    Raises:
        SettingsError: with each such feature and its option.
    """
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    refused = {
        "diffusion models, which need a scheduler of their own (--diffusion-config)": (
            vllm_config.diffusion_config is not None or (model is not None and model.is_diffusion)
        ),
        "pipeline parallelism with --enforce-eager on CPUs, where vLLM's own workers fail at the first "
        "request (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1
        and device == "cpu"
        and model is not None
        and model.enforce_eager,
        # The halves of a step would be handed the same slots.
        "dual-batch overlap and microbatches (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "prefill that skips layers which share the cache of others (--kv-sharing-fast-prefill)": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "pooling models (--runner pooling)": model is not None and model.runner_type == "pooling",
        "encoder-decoder models": model is not None and model.is_encoder_decoder,
    }
    asked = [feature for feature, present in refused.items() if present]
    if asked:
        raise SettingsError(
            f"TOKENSELECT does not support {' or '.join(asked)} in this release. Leave it out, or "
            "leave out --attention-backend TOKENSELECT."
        )


def _by_profile(vllm_config: VllmConfig) -> TokenSelectConfig:
    """Put a profile's settings into the configuration, so that no other process needs the file.

    Raises:
        SettingsError: for a file that is no profile, or that of another model.
    """
    additional = vllm_config.additional_config
    model = vllm_config.model_config
    resolved = resolve_profile(
        additional[ADDITIONAL_CONFIG_KEY], ProfileModel.of(model.model, model.hf_text_config)
    )
    get_logger(__name__).info("TOKENSELECT serves by %s", resolved.said)
    vllm_config.additional_config = {**additional, ADDITIONAL_CONFIG_KEY: resolved.settings}
    return TokenSelectConfig.from_mapping(resolved.settings)


def _without_selection_cache(
    vllm_config: VllmConfig, config: TokenSelectConfig, asked: Collection[str]
) -> TokenSelectConfig:
    """Switch the Selection Cache off in the configuration, where the engine's processes read the settings.

    Args:
        asked: settings that the user gave, not a profile.

    Raises:
        SettingsError: when the user has set `similarity_threshold`.
    """
    additional = vllm_config.additional_config
    if "similarity_threshold" in asked or not isinstance(additional, Mapping):
        raise SettingsError(
            f"tokenselect similarity_threshold={config.similarity_threshold} cannot be used with "
            "--speculative-config: a reused selection would depend on which drafts were rejected. "
            "Set similarity_threshold to 1 in --additional-config, or leave out "
            "--speculative-config."
        )
    get_logger(__name__).info(
        "TOKENSELECT selects for every token anew (similarity_threshold 1): with "
        "--speculative-config a reused selection would depend on which drafts were rejected."
    )
    settings = copy(additional.get(ADDITIONAL_CONFIG_KEY, {}))
    settings["similarity_threshold"] = 1.0
    vllm_config.additional_config = {**additional, ADDITIONAL_CONFIG_KEY: settings}
    return TokenSelectConfig.from_mapping(settings)


def _choose_scheduler(scheduler_config: SchedulerConfig) -> None:
    chosen = scheduler_config.scheduler_cls
    if chosen is None:
        name = "AsyncScheduler" if scheduler_config.async_scheduling else "Scheduler"
        scheduler_config.scheduler_cls = f"{SCHEDULERS}.TokenSelect{name}"
        return
    path = chosen if isinstance(chosen, str) else f"{chosen.__module__}.{chosen.__qualname__}"
    if not path.startswith(f"{SCHEDULERS}."):
        raise SettingsError(
            f"--scheduler-cls {path} cannot be used with TOKENSELECT, which needs its own scheduler "
            "to keep query chunks whole, to cut prefix-cache hits at chunk boundaries and to keep "
            "blocks of other settings out of them. Leave out --scheduler-cls, or leave out "
            "--attention-backend TOKENSELECT."
        )


def _check_and_configure(check_and_update_config: Any, cls: Any, vllm_config: VllmConfig) -> None:
    check_and_update_config(cls, vllm_config)
    configure(vllm_config, cls.device_name)


def install(platform: type[Platform]) -> None:
    """Wrap the platform class; safe to call again. A platform without kernels will refuse TOKENSELECT."""
    seam = SEAMS.get(platform.device_name)
    if seam is not None:
        seam.wrap(_check_and_configure, platform)
    else:
        wrap_function(platform, "check_and_update_config", _check_and_configure)
