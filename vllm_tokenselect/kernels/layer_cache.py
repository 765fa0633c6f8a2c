"""What a layer keeps of its requests, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState


@dataclass(frozen=True)
class LayerCache:
    """What a layer reads: its part of the KV cache, and what goes with it.

    Attributes:
        pages: fp32, bf16, fp16 or fp8 [num_blocks, Hkv, 2, block_size, D], any strides whose last is 1.
        key_scale, value_scale: fp32 [1] on the device, what a quantized cache is multiplied by; None
            for one that is not quantized.
        selections: the Selection Cache; None for a layer without.
        rotation: of queries and keys to the positions that they are given anew; None for a layer whose
            cache holds keys that the model has rotated.
        sinks: fp32, bf16 or fp16 [Hq], of each head a logit that adds to the denominator of its softmax,
            whatever a query attends to; None for a layer without.
        soft_cap: `cap * tanh(score / cap)` takes the place of the attention's scores; 0 for no cap. On a
            GPU the library that attends is made for one cap and does not read it here.
        follows: whether generated tokens attend to what the last anchor below has selected in this step.
            Such a layer has no Selection Cache.
        followers: of an anchor, how many layers attend to what it selects.
    """

    pages: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    selections: SelectionCacheState | None = None
    rotation: Rotation | None = None
    sinks: torch.Tensor | None = None
    soft_cap: float = 0.0
    follows: bool = False
    followers: int = 0
