"""Which library attends on a GPU: FlashAttention, then xformers, then PyTorch's SDPA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention, SdpaAttention
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.hooks.log import get_logger
from vllm_tokenselect.method import SettingsError

Library = Literal["flash", "xformers", "sdpa"]


def why_not(library: Library, head_size: int, dtype: torch.dtype) -> str:
    """Why a library cannot attend here; empty if it can."""
    if library == "sdpa":
        return ""
    if dtype == torch.float32:
        return f"{library} has no kernels for float32"
    if library == "xformers":
        return "" if find_spec("xformers") else "xformers is not installed (extra `xformers`)"
    if get_flash_attn_version(head_size=head_size) is None:
        return "this vLLM has no FlashAttention for this GPU"
    return ""


def choose_library(setting: str, head_size: int, dtype: torch.dtype) -> Library:
    """The library that the setting `attention` asks for, or the best that can attend.

    Raises:
        SettingsError: when the one asked for cannot.
    """
    libraries: tuple[Library, ...] = ("flash", "xformers", "sdpa")
    for library in libraries:
        reason = why_not(library, head_size, dtype)
        if setting == library and reason:
            raise SettingsError(
                f"tokenselect attention={setting!r} cannot be used: {reason}. Set it to 'auto'."
            )
        if setting in (library, "auto") and not reason:
            return library
    raise AssertionError(setting)


def make_attention(
    library: Library,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    quantised: bool,
    width: int,
    device: torch.device,
) -> RowAttention:
    """The library's attention; it may hold scratch, so layers of a shape should share one.

    Args:
        dtype: of the queries.
        quantised: whether the KV cache is.
        width: most tokens of a row.
    """
    log = get_logger(__name__)
    version = get_flash_attn_version(head_size=head_size) if library == "flash" else None
    name = f"FlashAttention {version}" if version else library
    in_place = version == 3 and not quantised
    log.info(
        "TOKENSELECT attends with %s, %s",
        name,
        "through the sparse block table" if in_place else "over gathered tokens",
    )
    if version is not None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        if in_place:
            return PagedFlashAttention(flash_attn_varlen_func)
    buffer = GatherBuffer(num_kv_heads, head_size, dtype, width, device)
    if version is not None:
        return GatheredFlashAttention(flash_attn_varlen_func, version, buffer)
    if library == "xformers":
        from vllm_tokenselect.gpu.xformers import XformersAttention

        return XformersAttention(buffer)
    return SdpaAttention(buffer)
