"""Which library attends on a GPU: FlashAttention, then xformers, then PyTorch's SDPA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.gpu.flash_attention import reads_in_place
from vllm_tokenselect.method.settings import SettingsError

Library = Literal["flash", "xformers", "sdpa"]
# Most elements of a head that FlashAttention 2 and 3 take; Gemma 4 has heads of 512.
LARGEST_HEAD = 256


def why_not(
    library: Library,
    head_size: int,
    dtype: torch.dtype,
    has_sinks: bool = False,
    soft_cap: float = 0.0,
) -> str:
    """Why a library cannot attend here; empty if it can."""
    if library == "sdpa":
        return ""
    if library == "xformers" and (has_sinks or soft_cap):
        return "xformers has no " + ("attention sinks" if has_sinks else "logits soft cap")
    if dtype == torch.float32:
        return f"{library} has no kernels for float32"
    name: str = library
    if library == "xformers":
        if not find_spec("xformers"):
            return "xformers is not installed (extra `xformers`)"
    else:
        version = get_flash_attn_version(head_size=head_size)
        if version is None:
            return "this vLLM has no FlashAttention for this GPU"
        if version > 3:
            return ""
        name = f"FlashAttention {version}"
    if head_size > LARGEST_HEAD:
        return (
            f"{name} takes heads of up to {LARGEST_HEAD} elements, and some here have {head_size}"
        )
    return ""


def choose_library(
    setting: str,
    head_size: int,
    dtype: torch.dtype,
    has_sinks: bool = False,
    soft_cap: float = 0.0,
) -> Library:
    """The library that the setting `attention` asks for, or the best that can attend.

    Whether a layer has sinks or a soft cap only decides between xformers and SDPA. A caller that asks
    before layers are made does not know it, and may be told xformers, which promises no CUDA graphs,
    instead of SDPA.

    Raises:
        SettingsError: when the one asked for cannot.
    """
    libraries: tuple[Library, ...] = ("flash", "xformers", "sdpa")
    for library in libraries:
        reason = why_not(library, head_size, dtype, has_sinks, soft_cap)
        if setting == library and reason:
            raise SettingsError(
                f"tokenselect attention={setting!r} cannot be used: {reason}. Set it to 'auto'."
            )
        if setting in (library, "auto") and not reason:
            return library
    raise AssertionError(setting)


def serves_full_attention(vllm_config: VllmConfig) -> str | None:
    """Why a GPU cannot serve requests that ask for full attention; None if it can.

    Tokens that are gathered before they are attended lie in a buffer for as many as are selected. Only a
    library that reads the cache through the sparse block table can read a whole context. Any process may
    call this: it asks the driver for the kind of GPU, and makes no CUDA context.

    Raises:
        SettingsError: when the library that the setting `attention` names cannot attend.
    """
    settings = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    if settings.method.reassigns_positions:
        return (
            "positions are reassigned while tokens are gathered; it takes the tokenselect setting "
            "positions 'native'"
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if is_quantized_kv_cache(cache_dtype):
        return f"a KV cache of {cache_dtype} is read token by token; it takes --kv-cache-dtype auto"
    for head_size in _head_sizes(vllm_config):
        with set_current_vllm_config(vllm_config):  # which may name the version
            library = choose_library(settings.attention, head_size, vllm_config.model_config.dtype)
            version = flash_version(library, head_size)
        if not reads_in_place(version, as_cached=True):
            return (
                f"{library_name(library, version)} attends over gathered tokens here; it takes "
                "FlashAttention 3, which is for Hopper GPUs (H100, H200) and heads of up to "
                f"{LARGEST_HEAD} elements"
            )
    return None


def _head_sizes(vllm_config: VllmConfig) -> set[int]:
    """Head sizes of all layers, some of which may be larger than the model's configuration says."""
    model = vllm_config.model_config.model_arch_config
    sizes = {model[layer].head_size for layer in range(model.total_num_hidden_layers)}
    return sizes or {model.head_size}


def library_name(library: Library, version: int | None) -> str:
    return library if version is None else f"FlashAttention {version}"


def flash_version(library: Library, head_size: int) -> int | None:
    version: int | None = None
    if library == "flash":
        version = get_flash_attn_version(head_size=head_size)
    return version
