"""How many tokens a request selects; the same on both model runners."""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.method.request_settings import requested_top_k
from vllm_tokenselect.method.settings import FULL_ATTENTION, SettingsError


def top_k_of(runner: Any, sampling_params: Any) -> int:
    """Tokens that a request selects, by its own settings or the server's.

    Settings that cannot be served should have been refused twice before. Here they are logged, and the
    server's are used: an error would end the worker, and every other request with it.

    Args:
        runner: vLLM's `GPUModelRunner`, of either version; keeps the server's setting.
        sampling_params: of the request; None for one that samples nothing.
    """
    if not is_selected(runner.vllm_config.attention_config):
        return FULL_ATTENTION  # another engine of this process, whose layers do not ask
    server_top_k: int | None = runner.__dict__.get("_tokenselect_top_k")
    if server_top_k is None:
        additional = runner.vllm_config.additional_config
        server_top_k = TokenSelectConfig.from_additional_config(additional).top_k
        runner._tokenselect_top_k = server_top_k
    try:
        return requested_top_k(getattr(sampling_params, "extra_args", None), server_top_k)
    except SettingsError as error:
        get_logger(__name__).warning_once(
            "TOKENSELECT: a request came to the worker with settings that cannot be used, and gets the "
            "server's in their stead: %s",
            error,
        )
        return server_top_k
