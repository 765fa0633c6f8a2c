"""Torch tensors as the numpy arrays that numba kernels take, at a few microseconds a call.

The kernels are compiled for contiguous arrays of these dtypes only: another layout would compile them
again in the middle of serving.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

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


def with_whole_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """[T, H, D], contiguous within a token; a slice of a wider projection is taken as it lies."""
    _, head_distance, distance = tokens.stride()
    if distance == 1 and head_distance == tokens.shape[2]:
        return tokens
    return tokens.contiguous()


def locate_tokens(tokens: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """Where the elements of a tensor [T, H, D] `with_whole_tokens` lie, for compiled code.

    To make an array of a tensor takes PyTorch and numpy two microseconds, a layer has five such tensors,
    and a token thirty layers. So `elements_at` makes it; the caller keeps the tensor.

    Returns:
        the address of the first element, how many there are to the last, and from one token to the next.

    Raises:
        TypeError: they are not of the dtype that compiled code reads them as.
    """
    if tokens.dtype is not dtype:
        raise TypeError(f"{tokens.dtype} where {dtype} is expected")
    num_tokens, num_heads, head_size = tokens.shape
    distance = tokens.stride(0)
    size = (num_tokens - 1) * distance + num_heads * head_size if num_tokens else 0
    return tokens.data_ptr(), size, distance


@intrinsic
def elements_at(typingctx, address, size, like):
    """So many elements at an address as an array like another, in compiled code; nothing keeps them."""

    def codegen(context, builder, sig, args):
        address, size, _ = args
        array = context.make_array(sig.return_type)(context, builder)
        itemsize = context.get_constant(types.intp, sig.return_type.dtype.bitwidth // 8)
        populate_array(
            array,
            data=builder.inttoptr(address, array.data.type),
            shape=[size],
            strides=[itemsize],
            itemsize=itemsize,
            meminfo=None,
        )
        return array._getvalue()

    return like(types.intp, types.intp, like), codegen


def sink_logits(sinks: torch.Tensor | None) -> np.ndarray:
    """fp32 [Hq]; of no element where there are no sinks."""
    if sinks is None:
        return np.zeros(0, np.float32)
    return sinks.detach().float().contiguous().numpy()


def rotation_table(cos_sin: torch.Tensor | None) -> np.ndarray:
    """fp32 [positions, rotated]; of width 0 where nothing is rotated."""
    return np.zeros((0, 0), np.float32) if cos_sin is None else cos_sin.numpy()


class Queries(NamedTuple):
    """Queries of a layer, one for each row.

    Attributes:
        address, size, distance: of [T, num_heads, D], as `locate_tokens` gives them.
        tokens: int32 [R], which of the T each row asks with.
        num_heads, num_kv_heads: of the queries.
    """

    address: int
    size: int
    distance: int
    tokens: np.ndarray
    num_heads: int
    num_kv_heads: int


class LayerArrays(NamedTuple):
    """A layer's `LayerCache`; what it does not have is an array without elements.

    Attributes:
        pages: elements of [num_blocks, Hkv, 2, block_size, D], as `cache_elements` gives them.
        head_size: D.
        scale: fp32, of q . k.
        last_query, selected, last_end, owner: of the Selection Cache, as in `SelectionCacheState`. The
            layer's queries and outputs are elements of the kind of `last_query`.
        vote: fp32 [1, rotated], `Rotation.vote`.
        cos_sin: fp32 [positions, rotated], `Rotation.cos_sin`.
        sinks: fp32 [Hq].
        soft_cap: fp32.
        followers: layers that attend to what this one selects.
    """

    pages: np.ndarray
    head_size: int
    scale: np.float32
    last_query: np.ndarray
    selected: np.ndarray
    last_end: np.ndarray
    owner: np.ndarray
    vote: np.ndarray
    cos_sin: np.ndarray
    sinks: np.ndarray
    soft_cap: np.float32
    followers: int

    @classmethod
    def of(cls, layer: LayerCache, scale: float, dtype: torch.dtype) -> LayerArrays:
        """Those of a layer whose queries have this dtype."""
        selections, rotation = layer.selections or _no_selections(dtype), layer.rotation
        return cls(
            pages=cache_elements(layer.pages),
            head_size=layer.pages.shape[4],
            scale=np.float32(scale),
            last_query=cache_elements(selections.query),
            selected=selections.selected.numpy(),
            last_end=selections.candidate_end.numpy(),
            owner=selections.owner.numpy(),
            vote=rotation_table(None if rotation is None else rotation.vote[None]),
            cos_sin=rotation_table(None if rotation is None else rotation.cos_sin),
            sinks=sink_logits(layer.sinks),
            soft_cap=np.float32(layer.soft_cap),
            followers=layer.followers,
        )


@cache
def _no_selections(dtype: torch.dtype) -> SelectionCacheState:
    lines = torch.empty(0, dtype=torch.int32)
    return SelectionCacheState(torch.empty(0, dtype=dtype), lines.view(0, 0), lines, lines)
