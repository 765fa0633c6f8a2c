"""The one entry point that vLLM calls, in every process, before arguments are parsed.

vLLM calls it in every environment that has the package, whether TOKENSELECT is chosen or not. So nothing
that goes wrong here stops a server: the backend is withdrawn with one warning, and only a server that asks
for it is refused.
"""

from __future__ import annotations

import logging
import os
from typing import Any

SUPPORTED_VLLM = ("0.32", "0.33")

_NAME = "TOKENSELECT"
# The processes that vLLM starts inherit it, and do not repeat the warning.
_WARNED = "TOKENSELECT_WITHDRAWAL_WARNED"


class UnsupportedVllm(RuntimeError):
    """The installed vLLM is not one that this release was built for."""


def check_vllm_version(version: str) -> None:
    """Check a vLLM version such as `0.32.0+cpu`.

    Raises:
        UnsupportedVllm: naming the version and what to do.
    """
    if ".".join(version.split(".")[:2]) in SUPPORTED_VLLM:
        return
    from vllm_tokenselect import __version__

    raise UnsupportedVllm(
        f"vllm-tokenselect {__version__} supports vLLM {' and '.join(SUPPORTED_VLLM)}, but vLLM "
        f"{version} is installed. Install a supported vLLM, or another vllm-tokenselect; to run "
        "this vLLM without it, leave out --attention-backend TOKENSELECT."
    )


def register() -> None:
    """Register the backend TOKENSELECT, and install the hooks, which stay idle until it is chosen.

    If that fails, for whatever reason, warn and withdraw the backend.
    """
    try:
        import vllm

        check_vllm_version(vllm.__version__)
        from vllm_tokenselect.hooks import install_in_every_process

        install_in_every_process()
    except Exception as error:
        withdraw(error)


def withdraw(error: Exception) -> None:
    """Refuse the name TOKENSELECT because of `error`; every other backend is served."""
    known = isinstance(error, UnsupportedVllm) or type(error).__name__ == "SeamBroken"
    reason = str(error) if known else f"vllm-tokenselect cannot start: {error!r}"
    if _WARNED not in os.environ:
        os.environ[_WARNED] = "1"
        logging.getLogger("vllm.tokenselect").warning(
            "The attention backend TOKENSELECT is not available; everything else is. %s", reason
        )
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError:
        return  # vLLM does not know the name, and refuses it without us
    # Every way to choose a backend looks its name up here. A member whose class refuses would not do: on
    # CPUs vLLM ignores backends that it does not know, and would serve full attention without a word.
    members = AttentionBackendEnum._member_map_
    others = {name: member for name, member in members.items() if name != _NAME}
    type.__setattr__(AttentionBackendEnum, "_member_map_", _Members(others, reason))
    if _NAME in vars(AttentionBackendEnum):
        type.__delattr__(AttentionBackendEnum, _NAME)


class _Members(dict[str, Any]):
    """The members of an enumeration by name. Looking up TOKENSELECT raises an error with the reason."""

    def __init__(self, members: dict[str, Any], reason: str) -> None:
        super().__init__(members)
        self.reason = reason

    def __missing__(self, name: str) -> Any:
        if name == _NAME:
            raise ValueError(f"--attention-backend TOKENSELECT is not available: {self.reason}")
        raise KeyError(name)
