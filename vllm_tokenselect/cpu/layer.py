"""A layer as its steps need it on a CPU: what it is made of is made once, not once a token."""

from __future__ import annotations

from typing import Any

import torch

from vllm_tokenselect.kernels.cpu_arrays import LayerArrays, sink_logits
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.write.cpu import write_elements


class CpuLayer:
    """What a layer reads, and the same as compiled code takes it; kept from step to step.

    To make them anew takes about ten microseconds, a fifth of what a layer of a small model takes for a
    generated token whose context is short.

    Args:
        cache: of the layer; its tensors stay where they are. Only its sinks may change, and are read
            anew by every step: they are a parameter of the model, loaded after the layer is made.
        scale: scale of q . k.
        dtype: of queries and outputs.
    """

    def __init__(self, cache: LayerCache, scale: float, dtype: torch.dtype) -> None:
        self.cache = cache
        self.scale = scale
        self.dtype = dtype
        self.num_kv_heads = cache.pages.shape[1]
        self._arrays = LayerArrays.of(cache, scale, dtype)
        self._plain = tuple(self._arrays)

    def arrays(self) -> tuple[Any, ...]:
        """`LayerArrays`, plain as compiled code gets them."""
        if self.cache.sinks is None:
            return self._plain
        return tuple(self._arrays._replace(sinks=sink_logits(self.cache.sinks)))

    def write_tokens(
        self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write `key`, `value` [T, Hkv, D] to the slots int64 [T]."""
        write_elements(key, value, self.cache.pages, self._arrays.pages, slot_mapping)
