"""Settings that a request brings along, in vLLM's extra arguments (`vllm_xargs` of the OpenAI API).

`{"tokenselect": "off"}` attends to the whole context; `{"tokenselect_top_k": 1024}` selects fewer tokens
than the server's `top_k`, never more: the server's buffers are cut for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_tokenselect.method import FULL_ATTENTION, SettingsError

PREFIX = "tokenselect"
SWITCH = "tokenselect"
TOP_K = "tokenselect_top_k"


def requested_top_k(extra_args: Mapping[str, Any] | None, server_top_k: int) -> int:
    """Tokens that the chunks of a request select.

    Args:
        extra_args: of the request; what does not start with `tokenselect` is somebody else's.
        server_top_k: the server's setting.

    Returns:
        The number, or `FULL_ATTENTION`.

    Raises:
        SettingsError: naming the value and what is allowed.
    """
    own = {name: value for name, value in (extra_args or {}).items() if name.startswith(PREFIX)}
    switch, top_k = own.pop(SWITCH, "on"), own.pop(TOP_K, None)
    if own:
        raise SettingsError(
            f"there is no extra argument {' or '.join(map(repr, own))}; {_allowed(server_top_k)}"
        )
    if switch not in ("on", "off"):
        raise SettingsError(f"{SWITCH}={switch!r} is neither: {_allowed(server_top_k)}")
    if top_k is not None and (
        not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= server_top_k
    ):
        raise SettingsError(f"{TOP_K}={top_k!r} cannot be used: {_allowed(server_top_k)}")
    if switch == "off":
        if top_k is not None:
            raise SettingsError(
                f'{SWITCH}="off" and {TOP_K}={top_k} exclude each other: {_allowed(server_top_k)}'
            )
        return FULL_ATTENTION
    return server_top_k if top_k is None else top_k


def _allowed(server_top_k: int) -> str:
    return (
        f'{SWITCH} is "on" or "off", and {TOP_K} an integer from 1 to this server\'s {server_top_k}'
    )
