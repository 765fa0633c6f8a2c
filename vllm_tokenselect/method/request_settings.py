"""Settings that a request brings along, in vLLM's extra arguments (`vllm_xargs` of the OpenAI API).

`{"tokenselect": "off"}` attends to the whole context; `{"tokenselect_top_k": 1024}` selects fewer tokens
than the server's `top_k`, never more: the server's buffers are cut for its own.

What a block of the KV cache holds depends on them, so blocks are told apart by a fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_tokenselect.method.misplaced import looks_like_ours
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method, SettingsError

SWITCH = "tokenselect"
TOP_K = "tokenselect_top_k"

# Of the method, not of the package: to be raised when the same settings select other tokens, since a KV
# store may outlive the server.
METHOD_VERSION = 1


def requested_top_k(extra_args: Mapping[str, Any] | None, server_top_k: int) -> int:
    """Tokens that the chunks of a request select.

    Args:
        extra_args: of the request; what does not look like `tokenselect` is somebody else's.
        server_top_k: the server's setting.

    Returns:
        The number, or `FULL_ATTENTION`.

    Raises:
        SettingsError: naming the value and what is allowed.
    """
    own = {name: value for name, value in (extra_args or {}).items() if looks_like_ours(name)}
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


def fingerprint(
    method: Method, top_k: int, tensor_parallel_size: int = 1, block_size: int = 1
) -> str:
    """Every setting that the keys and values of a shared block depend on, readable and stable.

    The others do not count: `tail_queries`, the Selection Cache and what follows from them act on
    positions that are never shared. So do anchors today; they count where they are not all layers, since
    they change most what generated tokens write, and a store outside of the server may keep those.

    Args:
        method: the server's, with query chunks that line up with its blocks.
        top_k: of the request; `FULL_ATTENTION` depends on no other setting.
        tensor_parallel_size: processes that a layer's heads are divided among. How many of them select
            apart counts: none but one where they vote together.
        block_size: tokens of a block, where query chunks are cut too.
    """
    if top_k == FULL_ATTENTION:
        return f"v{METHOD_VERSION}:off"
    settings: dict[str, object] = {
        "top_k": top_k,
        "n_init": method.n_init,
        "n_local": method.n_local,
        "query_chunk": method.query_chunk,
        "block_size": block_size,
        "dense_layers": method.dense_layers,
        "positions": method.positions,
        "voters": tensor_parallel_size if method.vote == "local" else 1,
    }
    if method.shares_selections:
        settings["anchor_layers"] = method.anchor_layers
    return f"v{METHOD_VERSION}:" + ",".join(f"{name}={value}" for name, value in settings.items())


def transfer_settings(
    method: Method, top_k: int, tensor_parallel_size: int, block_size: int
) -> str:
    """What two servers must have in common to hand over a request's blocks, as `fingerprint` takes it.

    Beside what the blocks hold, it counts where their prompt's end is cut, since whole blocks are moved up
    to there.
    """
    own = fingerprint(method, top_k, tensor_parallel_size, block_size)
    cut = {
        "block_size": block_size,
        "query_chunk": method.query_chunk,
        "tail_queries": method.tail_queries,
    }
    missing = (f"{name}={value}" for name, value in cut.items() if f"{name}=" not in own)
    return ",".join((own, *missing))


def _allowed(server_top_k: int) -> str:
    return (
        f'{SWITCH} is "on" or "off", and {TOP_K} an integer from 1 to this server\'s {server_top_k}'
    )
