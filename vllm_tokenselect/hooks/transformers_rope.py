"""The rotation of a model that vLLM runs in transformers' own code, where positions are reassigned.

Such a model has one rotary embedding, which gives all layers the cosines and sines of their angles. Here it
is replaced by one whose angles are zero. A few tokens with angles of 90 degrees then tell what a layer does
with them. If it rotates directly before it attends, in pairs that are half of the rotated part apart, then
its queries and keys are those of angles of zero with the halves exchanged. If they are the same as before,
the layer has no positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_tokenselect.hooks.rotary_probe import Inputs

CHANGED = "queries or keys are changed after their rotation (as by a norm)"
INTERLEAVED = "transformers' code rotates neighboring elements of a head, not halves"


class FixedAngles(nn.Module):
    """Takes the place of a rotary embedding of transformers; all its angles are zero.

    Args:
        width: cosines that it gives each token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [..., tokens, width] of the dtype of `hidden`."""
        shape = (*position_ids.shape, self.width)
        return hidden.new_ones(shape), hidden.new_zeros(shape)

    @contextmanager
    def turned(self) -> Iterator[None]:
        """While the context is open, all angles are 90 degrees."""
        hook = self.register_forward_hook(lambda module, args, output: output[::-1])
        try:
            yield
        finally:
            hook.remove()


def find(model: nn.Module) -> tuple[str, Any] | None:
    """The model's one rotary embedding and its name; None if it has none or several."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
        and hasattr(module, "attention_scaling")
    ]
    return found[0] if len(found) == 1 else None


def changes_with_the_length(embedding: Any) -> bool:
    """Whether its frequencies depend on how long the text is."""
    return embedding.rope_type in ("dynamic", "longrope")


def table_of(embedding: Any, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines [positions, rotated] of an embedding, rounded to `dtype` as it rounds them."""
    frequencies = embedding.inv_freq.float()
    positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(positions, frequencies)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    return (table * float(embedding.attention_scaling)).to(dtype)


def problem_with(unrotated: Inputs, turned: Inputs, head_size: int, rotated: int) -> str | None:
    """What a layer does to queries and keys besides rotating them in pairs that are a half apart; or None.

    Args:
        unrotated, turned: what it attends with under angles of zero, and of 90 degrees.
        rotated: elements of a head that are rotated.
    """
    pairs = [
        (before.reshape(-1, head_size), after.reshape(-1, head_size))
        for before, after in zip(unrotated, turned, strict=True)
        if before is not None and after is not None
    ]
    if all(torch.equal(_turn(x, rotated), y) for x, y in pairs):
        return None
    if all(torch.equal(_turn_neighbors(x, rotated), y) for x, y in pairs):
        return INTERLEAVED
    return CHANGED


def _turn(heads: torch.Tensor, rotated: int) -> torch.Tensor:
    """Heads [n, D] under angles of 90 degrees."""
    first, second = heads[:, :rotated].chunk(2, dim=1)
    return torch.cat([-second, first, heads[:, rotated:]], dim=1)


def _turn_neighbors(heads: torch.Tensor, rotated: int) -> torch.Tensor:
    """Heads [n, D] whose neighboring elements are pairs, under angles of 90 degrees."""
    first, second = heads[:, :rotated:2], heads[:, 1:rotated:2]
    return torch.cat([torch.stack([-second, first], dim=2).flatten(1), heads[:, rotated:]], dim=1)
