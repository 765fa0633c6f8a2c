"""Refuse a KV cache that TOKENSELECT cannot read.

The kernels, and the libraries that attend, copy keys and values as they are. They take the cache to hold
numbers of the queries' dtype. Only the fp8 caches of GPUs are converted, by vLLM's own writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.refusals import refuse_model
from vllm_tokenselect.engine.step_size import check_steps, ends_steps_at_blocks
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def check_kv_cache_dtype(cache_dtype: str, model_dtype: torch.dtype, device_type: str) -> None:
    """Check `--kv-cache-dtype` against the model's dtype.

    Args:
        cache_dtype: the flag's value, or what a quantized checkpoint asks for where it is `auto`.
        device_type: "cpu" or "cuda".

    Raises:
        SettingsError: naming the flag, the value and what is allowed.
    """
    own = str(model_dtype).removeprefix("torch.")
    allowed = ("auto", own, *(_FP8 if device_type == "cuda" else ()))
    if cache_dtype not in allowed:
        raise SettingsError(
            f"--kv-cache-dtype {cache_dtype} cannot be used with TOKENSELECT and a model in {own} "
            f"(--dtype) on this device. Use {', '.join(allowed[:-1])} or {allowed[-1]}, or leave out "
            "--attention-backend TOKENSELECT."
        )


def check_cache(
    kv_cache_spec: KVCacheSpec, layer_name: str, vllm_config: VllmConfig
) -> TokenSelectConfig:
    """Check that a layer's KV cache is one that TOKENSELECT can serve; returns the settings.

    Raises:
        SettingsError: saying what is allowed.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if not isinstance(kv_cache_spec, FullAttentionSpec):
        kind = type(kv_cache_spec).__name__.removesuffix("Spec")
        refuse_model(f"{layer_name} caches keys for {kind}, not for full attention")
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    block_size = vllm_config.cache_config.block_size
    check_steps(config, vllm_config, block_size, ends_steps_at_blocks(vllm_config))
    return config
