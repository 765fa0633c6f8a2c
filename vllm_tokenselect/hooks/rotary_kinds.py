"""Rotary embeddings of vLLM and the layers beside them: what takes their place, and their tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class Unrotated(nn.Module):
    """Takes the place of a model's rotary embedding, and rotates nothing: the layer does.

    Args:
        embedding: the one whose place it takes. If that pairs neighboring elements, a head's elements are
            put in the order in which the elements of a pair are half of the rotated part apart. This does
            not change products of queries and keys.
    """

    order: torch.Tensor | None

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.head_size: int = getattr(embedding, "head_size", 0)
        order = None
        if not getattr(embedding, "is_neox_style", True):
            rotated = torch.arange(embedding.rotary_dim)
            rest = torch.arange(embedding.rotary_dim, embedding.head_size)
            order = torch.cat([rotated[0::2], rotated[1::2], rest])
            order = order.to(embedding.cos_sin_cache.device)
        self.register_buffer("order", order, persistent=False)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`query` and `key` [..., heads * D] or [..., heads, D], as the embedding takes them.

        A layer that reads another's keys has none of its own.
        """
        return self._ordered(query), None if key is None else self._ordered(key)

    def _ordered(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return vectors
        return vectors.reshape(-1, self.head_size)[:, self.order].view(vectors.shape)


def is_rotary_embedding(module: nn.Module) -> bool:
    return type(module).__module__.startswith("vllm.model_executor.layers.rotary_embedding")


def unusable(embedding: Any, model_config: ModelConfig) -> str | None:
    """Why a layer cannot rotate in an embedding's stead; None if it can."""
    from vllm.model_executor.layers import rotary_embedding as kinds

    if isinstance(embedding, kinds.Phi3LongRoPEScaledRotaryEmbedding):
        return None
    forward = getattr(type(embedding), "forward_native", None)
    if forward is kinds.MRotaryEmbedding.forward_native:
        return None if reads_only_text(model_config) else NOT_ONLY_TEXT
    if forward is not kinds.RotaryEmbedding.forward_native:
        return f"{type(embedding).__name__} rotates in a way of its own"
    return None


NOT_ONLY_TEXT = (
    "positions have several dimensions (M-RoPE), and the order of an image's tokens does not give "
    "them; with --language-model-only, which takes text alone, it is served"
)


def reads_only_text(model_config: ModelConfig) -> bool:
    """Whether no prompt can hold an image. All dimensions of a position are then the same."""
    multimodal = model_config.multimodal_config
    return multimodal is None or multimodal.language_model_only


def table_of(embedding: Any, vllm_config: VllmConfig, max_attended: int) -> torch.Tensor:
    """Cosines and sines [positions, rotated] that an embedding rotates with.

    LongRoPE has two tables. vLLM takes the short one if no position passes the original context. So do we,
    with the positions of attended tokens. Lines of the long table that then follow are never read.
    """
    table: torch.Tensor
    if not hasattr(embedding, "long_short_cos_sin_cache"):
        table = embedding.cos_sin_cache
        return table
    original = embedding.original_max_position_embeddings
    longest = min(max_attended, vllm_config.model_config.max_model_len)
    table = embedding.long_short_cos_sin_cache
    return table if longest <= original else table[original:]


def num_positions(embedding: Any) -> int:
    """Positions that an embedding, left in its place, can rotate to."""
    if hasattr(embedding, "long_short_cos_sin_cache"):
        original: int = embedding.original_max_position_embeddings
        longest: int = embedding.max_position_embeddings
        return longest if embedding.use_long_rope else original
    return len(embedding.cos_sin_cache)


class AttentionLayer(NamedTuple):
    """A layer of the model that attends, and the module that calls it."""

    name: str
    attention: Any
    owner: nn.Module

    @property
    def reassigns(self) -> bool:
        return getattr(self.attention.impl, "reassigns_positions", False)

    def embeddings(self) -> list[tuple[str, Any]]:
        """Rotary embeddings beside the layer, with their names."""
        return [
            (name, child)
            for name, child in self.owner.named_children()
            if is_rotary_embedding(child)
        ]


def attention_layers(model: nn.Module) -> Iterator[AttentionLayer]:
    from vllm.model_executor.layers.attention import Attention

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            owner = name.rpartition(".")[0]
            while isinstance(model.get_submodule(owner), nn.ModuleList):
                owner = owner.rpartition(".")[0]
            yield AttentionLayer(name, module, model.get_submodule(owner))


def extend_table(layer: AttentionLayer, max_model_len: int) -> None:
    """Give a layer that keeps its rotation, such as a sliding-window one, positions to the end.

    It never sees two tokens that are further apart than it was trained on, but their positions in the text
    pass the end of its table.

    Raises:
        SettingsError: with the largest `--max-model-len` that would do.
    """
    from vllm.model_executor.layers import rotary_embedding as kinds

    for _, embedding in layer.embeddings():
        positions = num_positions(embedding)
        if positions >= max_model_len:
            continue
        # Some of the other kinds change with the length that they are made for.
        if type(embedding) not in (kinds.RotaryEmbedding, kinds.Llama3RotaryEmbedding):
            raise SettingsError(
                f"--max-model-len {max_model_len} passes the rotary table of {layer.name}, which stays on "
                f"vLLM's default backend and is of a kind that cannot be made longer "
                f"({type(embedding).__name__}, {positions} positions). Set "
                f"--max-model-len to {positions}."
            )
        embedding.max_position_embeddings = max_model_len
        table = embedding._compute_cos_sin_cache()
        embedding.cos_sin_cache = table.to(embedding.cos_sin_cache)


def rotate_alike(embedding: Any, other: Any) -> bool:
    """Whether two embeddings, or none in the place of one, rotate in the same way."""
    if embedding is None or other is None:
        return embedding is other
    name = "long_short_cos_sin_cache"
    if not hasattr(embedding, name):
        name = "cos_sin_cache"
    return embedding is other or (
        hasattr(other, name)
        and getattr(embedding, "is_neox_style", True) == getattr(other, "is_neox_style", True)
        and torch.equal(getattr(embedding, name), getattr(other, name))
    )
