"""A causal language model of transformers whose attention is ours to watch and to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "tokenselect_diagnosis"

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]
"""Attention of one layer over one sequence.

Called with the layer's number, rotated queries [Hq, T, D], keys and values [Hkv, T, D] and the scale of
q . k. Returns the output [Hq, T, D], or None where the model is to attend as it is used to.
"""


class UnsupportedModel(ValueError):
    """The model attends in a way that TOKENSELECT does not serve. The message says which."""


class DiagnosedModel:
    """A model that reads one sequence at a time.

    Args:
        name: folder or name of a model of transformers.
        device: of torch.
        dtype: of the weights; "auto" for that of the files.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: str = "auto") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        self._model.set_attn_implementation(_NAME)
        self._device = device

    @torch.inference_mode()
    def losses(
        self, tokens: list[int], count: int, attention: Attention | None = None
    ) -> torch.Tensor:
        """Read tokens, every full-attention layer by `attention`.

        Args:
            tokens: of the sequence.
            count: how many of the last tokens to predict, fewer than there are.
            attention: None for the model's own.

        Returns:
            negative log-likelihoods fp32 [count], nats, of the last tokens.

        Raises:
            UnsupportedModel: when a layer attends in a way that cannot be served.
        """
        ids = torch.tensor([tokens], device=self._device)
        with _attending(attention):
            logits = self._model(ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
        return torch.nn.functional.cross_entropy(
            logits.float(), ids[0, -count:], reduction="none"
        ).cpu()


_attention: Attention | None = None


@contextmanager
def _attending(attention: Attention | None) -> Iterator[None]:
    global _attention
    _attention = attention
    try:
        yield
    finally:
        _attention = None


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    unsupported = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    if unsupported:
        raise UnsupportedModel(
            f"{type(module).__name__} attends with {' and '.join(unsupported)}, which TOKENSELECT "
            "does not serve."
        )
    # Layers with a sliding window stay as they are, here as in the server.
    if _attention is not None and kwargs.get("sliding_window") is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        number: int = module.layer_idx  # type: ignore[assignment]
        out = _attention(number, query[0], key[0], value[0], scale)
        if out is not None:
            return out.transpose(0, 1)[None].contiguous(), None
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return result


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, sdpa_mask)
