"""The rotation of a model that vLLM runs in transformers' own code, where positions are reassigned.

Such a model has one rotary embedding, which gives all layers the cosines and sines of their angles. Here it
is replaced by one whose angles are zero. Two runs with a few tokens then tell that every layer rotates
directly before it attends, and in pairs that are half of the rotated part apart: under angles of 90 degrees
its queries and keys must be those of angles of zero, with the halves exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What a layer attends with: its queries and its keys.
Inputs = tuple[torch.Tensor, ...]


class ZeroAngles(nn.Module):
    """Stands where a rotary embedding of transformers was.

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


def take_over(
    model: nn.Module,
    name: str,
    embedding: Any,
    head_sizes: dict[str, int],
    run: Callable[[], dict[str, Inputs]],
) -> list[str]:
    """Replace the embedding, and try it.

    Args:
        name: of the embedding in the model.
        head_sizes: of the layers, by name.
        run: sends a few tokens through the model; gives what each layer attends with.

    Returns:
        the layers that do not rotate directly before they attend, or in other pairs.
    """
    rotated = 2 * len(embedding.inv_freq)
    parent, _, attribute = name.rpartition(".")
    zero_angles = ZeroAngles(rotated)
    setattr(model.get_submodule(parent), attribute, zero_angles)
    unrotated = run()
    hook = zero_angles.register_forward_hook(lambda module, args, output: output[::-1])
    try:
        turned = run()
    finally:
        hook.remove()
    return [
        layer
        for layer, head_size in head_sizes.items()
        if layer not in unrotated
        or layer not in turned
        or not all(
            torch.equal(_turn(x.reshape(-1, head_size), rotated), y.reshape(-1, head_size))
            for x, y in zip(unrotated[layer], turned[layer], strict=True)
        )
    ]


def _turn(heads: torch.Tensor, rotated: int) -> torch.Tensor:
    """Heads [n, D] under angles of 90 degrees."""
    first, second = heads[:, :rotated].chunk(2, dim=1)
    return torch.cat([-second, first, heads[:, rotated:]], dim=1)
