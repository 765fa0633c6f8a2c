"""How many tokens a request selects, on either model runner."""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.request_settings import requested_top_k


def top_k_of(runner: Any, sampling_params: Any) -> int:
    """Tokens that a request selects, by its own settings or the server's.

    Args:
        runner: vLLM's `GPUModelRunner`, of either version; keeps the server's setting.
        sampling_params: of the request; None for one that samples nothing.

    Raises:
        SettingsError: for settings that the API server should have refused.
    """
    server_top_k: int | None = runner.__dict__.get("_tokenselect_top_k")
    if server_top_k is None:
        additional = runner.vllm_config.additional_config
        server_top_k = TokenSelectConfig.from_additional_config(additional).top_k
        runner._tokenselect_top_k = server_top_k
    return requested_top_k(getattr(sampling_params, "extra_args", None), server_top_k)
