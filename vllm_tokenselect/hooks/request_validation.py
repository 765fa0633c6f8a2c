"""Refuse a request whose own settings cannot be served, while it can still be told so.

Wraps `Platform.validate_request`, vLLM's hook for that, which the input processor calls in the API
server and in an offline `LLM`. Past it, a bad value would stop the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method import FULL_ATTENTION, Method, SettingsError
from vllm_tokenselect.request_settings import SWITCH, requested_top_k

SEAM = Seam(
    name="request_validation",
    module="vllm.v1.engine.input_processor",
    qualname="InputProcessor.process_inputs",
    parameters=("self", "request_id", "prompt", "params"),
    contains=("current_platform.validate_request(engine_input, params)",),
    why="refuses a request whose own settings cannot be served",
)


class Engine:
    """What requests may ask of the engine that this process sends them to."""

    def __init__(self, vllm_config: Any, method: Method, device_type: str) -> None:
        self.vllm_config = vllm_config
        self.method = method
        self.device_type = device_type

    @cached_property
    def why_not_full_attention(self) -> str | None:
        """Why `"off"` cannot be served; None if it can. Asked late: it loads GPU libraries."""
        if self.method.reassigns_positions:
            return (
                "positions are reassigned, and a whole context may have more tokens than the model was "
                "trained on; it takes a server without that setting"
            )
        if self.device_type != "cuda":
            return None
        from vllm_tokenselect.backend.gpu_attention import serves_full_attention

        return serves_full_attention(self.vllm_config)


# vLLM's hook is not told the engine; this is the last one that was configured in this process.
_engine: Engine | None = None


def use(engine: Engine | None) -> None:
    """Take what requests may ask; None if the engine is not on TOKENSELECT."""
    global _engine
    _engine = engine


def validate(params: Any) -> None:
    """Check vLLM's sampling (or pooling) parameters.

    Raises:
        VLLMValidationError: naming the value and what is allowed. The server answers it with HTTP
            400; it answers a `ValueError` at this point with 500 and without the message.
    """
    if _engine is None:
        return
    try:
        _check(_engine, getattr(params, "extra_args", None))
    except SettingsError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _check(engine: Engine, extra_args: Mapping[str, Any] | None) -> None:
    top_k = requested_top_k(extra_args, engine.method.top_k)
    if top_k == FULL_ATTENTION and engine.why_not_full_attention is not None:
        raise SettingsError(
            f'{SWITCH}="off" cannot be served here: {engine.why_not_full_attention}'
        )


def install(platform: type) -> None:
    """Wrap the platform class; safe to call again."""
    if SEAM.require() == "patched" or "_tokenselect_validate_request" in vars(platform):
        return
    original = platform.validate_request  # type: ignore[attr-defined]

    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(processed_inputs, params)
        validate(params)

    platform._tokenselect_validate_request = original  # type: ignore[attr-defined]
    platform.validate_request = classmethod(validate_request)  # type: ignore[attr-defined]
