"""Refuse a KV cache whose numbers have another dtype than the model's.

The kernels, and the libraries that attend, copy keys and values as they are and take the cache to hold
numbers of the queries' dtype. Only the fp8 caches of GPUs are converted, by vLLM's own writer.
"""

from __future__ import annotations

import torch

from vllm_tokenselect.method.settings import SettingsError

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
