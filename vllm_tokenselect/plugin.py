"""The one entry point that vLLM calls, in every process, before arguments are parsed."""

from __future__ import annotations

SUPPORTED_VLLM = ("0.32", "0.33")


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
        "this vLLM without it, uninstall vllm-tokenselect or leave it out of VLLM_PLUGINS."
    )


def register() -> None:
    """Register the backend TOKENSELECT and install the hooks that stay idle until it is chosen."""
    import vllm

    check_vllm_version(vllm.__version__)
    from vllm_tokenselect.hooks import install_in_every_process

    install_in_every_process()
