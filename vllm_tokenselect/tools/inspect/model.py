"""A causal language model of transformers whose attention can be watched and replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "tokenselect_diagnosis"

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]
"""Attention of one layer over one sequence.

Called with the layer's number, rotated queries [Hq, n, D], keys and values [Hkv, T, D] and the scale of
q . k. The queries are those of the last n of T tokens. Returns the output [Hq, n, D], or None to let the
model attend by itself.
"""


class UnsupportedModel(ValueError):
    """The model attends in a way that this module does not compute. The message names it."""


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
    def read(
        self,
        tokens: list[int],
        attention: Attention | None = None,
        beginning: Cache | None = None,
    ) -> Cache:
        """Keys and values of the beginning of a sequence, for `read` and `logits` to continue from.

        Args:
            beginning: those of its first tokens; unchanged when this returns.
        """
        cache, have = self._continued(beginning)
        with _attending(attention):
            self._model(self._ids(tokens[have:]), past_key_values=cache, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def logits(
        self,
        tokens: list[int],
        count: int,
        attention: Attention | None = None,
        beginning: Cache | None = None,
    ) -> torch.Tensor:
        """Read tokens, with `attention` in every layer that has no sliding window.

        Args:
            tokens: of the sequence.
            count: how many of the last tokens to predict, fewer than there are.
            attention: None for the model's own.
            beginning: keys and values of the sequence's beginning; unchanged when this returns.

        Returns:
            logits fp32 [count, vocabulary] of the last tokens.

        Raises:
            UnsupportedModel: when a layer attends in a way that this module does not compute.
        """
        cache, have = self._continued(beginning)
        with _attending(attention):
            out = self._model(
                self._ids(tokens[have:]),
                past_key_values=cache if have else None,
                use_cache=have > 0,
                logits_to_keep=count + 1,
            )
        logits: torch.Tensor = out.logits[0, :-1].float()
        return logits

    @torch.inference_mode()
    def extend(
        self, cache: Cache, tokens: list[int], attention: Attention | None = None
    ) -> torch.Tensor:
        """Read tokens behind those of a cache, and into it.

        Returns:
            logits fp32 [tokens, vocabulary] of the token behind each.
        """
        with _attending(attention):
            out = self._model(self._ids(tokens), past_key_values=cache)
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def losses(
        self,
        tokens: list[int],
        count: int,
        attention: Attention | None = None,
        beginning: Cache | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihoods fp32 [count], nats, of the last tokens; arguments as for `logits`."""
        target = torch.tensor(tokens[-count:], device=self._device)
        logits = self.logits(tokens, count, attention, beginning)
        return F.cross_entropy(logits, target, reduction="none").cpu()

    @property
    def text_config(self) -> Any:
        """The configuration of the model's text part."""
        return self._model.config.get_text_config()

    def _continued(self, beginning: Cache | None) -> tuple[Cache, int]:
        """A cache to continue in, and the number of tokens that it has."""
        if beginning is None:
            return DynamicCache(config=self._model.config), 0
        # No cache of a sliding window or of a recurrent state could be cropped back.
        return copy.deepcopy(beginning), beginning.get_seq_length()

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self._device)


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
            f"{type(module).__name__} attends with {' and '.join(unsupported)}, which is not computed "
            "here. `tokenselect doctor --model` tells whether a server does."
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
