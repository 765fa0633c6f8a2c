"""The ways to attend to what was selected that a device and an environment have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.attention_cases import Shape
from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.gpu.plain_attention import PlainAttention
from vllm_tokenselect.method.settings import Method


def attentions(
    shape: Shape, method: Method, soft_cap: float, device: torch.device
) -> Iterator[tuple[str, Callable[[], RowAttention]]]:
    """Name and maker of each that takes sinks, with a soft cap; 0 for none."""

    def buffer() -> GatherBuffer:
        heads = shape.num_kv_heads, shape.head_size
        return GatherBuffer(*heads, torch.bfloat16, method.max_attended, device)

    def gathered(version: int) -> RowAttention:
        return GatheredFlashAttention(varlen, version, buffer(), soft_cap)

    yield "plain PyTorch", lambda: PlainAttention(buffer(), soft_cap)
    if device.type == "cpu" or find_spec("vllm") is None:
        return
    from vllm.vllm_flash_attn import flash_attn_varlen_func as varlen
    from vllm.vllm_flash_attn import is_fa_version_supported

    if is_fa_version_supported(3):
        yield "FlashAttention 3 in place", lambda: PagedFlashAttention(varlen, soft_cap)
    for version in (2, 3, 4):
        # Blackwell's version 4 has no soft cap for larger heads.
        if is_fa_version_supported(version) and (version < 4 or shape.head_size <= 128):
            yield f"FlashAttention {version} gathered", partial(gathered, version)
