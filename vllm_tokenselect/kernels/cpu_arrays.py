"""Torch tensors as the numpy arrays that numba kernels take, at a few microseconds a call.

The kernels are compiled for contiguous arrays of these dtypes only: another layout would compile them
again in the middle of serving.
"""

from __future__ import annotations

import numpy as np
import torch

# numba computes in neither bf16 nor fp16, so a kernel gets their bits; the integer's sign tells it which.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}


def cache_elements(kv_cache: torch.Tensor) -> np.ndarray:
    """All elements of a contiguous cache, 1-D: float32, or uint16 (bf16 bits), or int16 (fp16 bits).

    Raises:
        KeyError: a dtype other than fp32, bf16 or fp16.
        RuntimeError: a cache that is not contiguous.
    """
    return kv_cache.view(-1).view(_BITS[kv_cache.dtype]).numpy()


def int32_array(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous int32 array; a copy only where the tensor is neither."""
    return tensor.to(torch.int32).contiguous().numpy()


def padded_queries(query: torch.Tensor, lanes: int) -> np.ndarray:
    """Queries as fp32 [R, Hq, D'], the head size padded with zeros to a multiple of `lanes`."""
    padding = -query.shape[-1] % lanes
    query = query.float()
    if padding:
        query = torch.nn.functional.pad(query, (0, padding))
    return query.contiguous().numpy()


def token_elements(tokens: torch.Tensor) -> tuple[np.ndarray, int]:
    """Elements of `tokens` [T, H, D] as `cache_elements` gives them, and how far two tokens are apart.

    A slice of a wider projection is taken as it lies; what is not contiguous within a token is copied.
    """
    num_tokens, num_heads, head_size = tokens.shape
    if tokens.stride(2) != 1 or tokens.stride(1) != head_size:
        tokens = tokens.contiguous()
    distance = tokens.stride(0)
    span = (num_tokens - 1) * distance + num_heads * head_size if num_tokens else 0
    return tokens.as_strided((span,), (1,)).view(_BITS[tokens.dtype]).numpy(), distance


def sink_logits(sinks: torch.Tensor | None) -> np.ndarray:
    """fp32 [Hq]; of no element where there are no sinks."""
    if sinks is None:
        return np.zeros(0, np.float32)
    return sinks.detach().float().contiguous().numpy()


def rotation_table(cos_sin: torch.Tensor | None) -> np.ndarray:
    """fp32 [positions, rotated]; of width 0 where nothing is rotated."""
    return np.zeros((0, 0), np.float32) if cos_sin is None else cos_sin.numpy()
