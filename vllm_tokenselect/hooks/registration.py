"""Make `--attention-backend TOKENSELECT` a name that vLLM knows, in every process.

This hook wraps nothing: vLLM's public `register_backend` adds a member to `AttentionBackendEnum`. When vLLM
spawns its engine and workers, it pickles the member by value, and unpickles it there before it loads
plugins, when no such value exists yet. So the member is pickled as a call of `backend_member`, which
registers it first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_tokenselect.hooks.seam import Seam

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "TOKENSELECT"
BACKEND_PATH = "vllm_tokenselect.backend.TokenSelectBackend"

SEAM = Seam(
    name="registration",
    module="vllm.v1.attention.backends.registry",
    qualname="AttentionBackendEnum.register",
    parameters=("cls", "name", "value"),
    contains=(
        "member = object.__new__(cls)",
        "cls._member_map_[name] = member",
        "cls._value2member_map_[value] = member",
    ),
    why="registers TOKENSELECT as an enum member that survives pickling into spawned processes",
    retired_by="vLLM pickles its backends by name, and loads plugins before it unpickles them",
)


def backend_member() -> AttentionBackendEnum:
    """The enum member TOKENSELECT, registered if it was not."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
        member = AttentionBackendEnum[BACKEND_NAME]
        # On the member, not on the class: vLLM's own members keep their way of pickling.
        member.__reduce_ex__ = lambda protocol: (backend_member, ())
    return AttentionBackendEnum[BACKEND_NAME]


def install() -> None:
    """Register the backend through vLLM's public door; safe to call again."""
    if SEAM.require() == "holds":
        backend_member()


def is_selected(attention_config: object) -> bool:
    """Whether vLLM's `AttentionConfig` puts any layers on TOKENSELECT."""
    per_kind = getattr(attention_config, "backend_per_kind", None) or {}
    chosen = [getattr(attention_config, "backend", None), *per_kind.values()]
    return any(getattr(backend, "name", backend) == BACKEND_NAME for backend in chosen)
