"""What the attention layers of all devices have in common: what is refused, and the settings."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import Any, TypeVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata, AttentionType

from vllm_tokenselect.backend.tensor_parallel import heads_that_vote_together
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.refusals import refuse_model
from vllm_tokenselect.kernels.head_group import num_voting_heads
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.anchors import Role
from vllm_tokenselect.method.settings import SettingsError

M = TypeVar("M", bound=AttentionMetadata)


class TokenSelectImpl(AttentionImpl[M]):
    """One attention layer; subclasses write, select and attend.

    Attributes:
        sinks: [num_heads], fp32 or of the model's dtype: a logit of each query head that adds to the
            denominator of its softmax; None for none. A parameter of the model, whose weights are
            loaded after the layer is made: read it as the layer attends.
        logits_soft_cap: `cap * tanh(scale * q.k / cap)` takes the place of `scale * q.k` in the
            attention; 0 for no cap.
        attends_with: what attends, in words; known once the layer is prepared.
        selections: the layer's part of the Selection Cache; None for a layer without.
        follows, followers: the layer's role, as in `LayerCache`.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            **{f"the attention option {name}": value for name, value in unknown.items()},
        }
        asked = [name for name, value in refused.items() if value is not None]
        if asked:
            refuse_model(
                f"its attention has {' and '.join(asked)}, which TOKENSELECT does not compute"
            )
        vllm_config = get_current_vllm_config()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sinks = sinks
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.kv_cache_dtype = kv_cache_dtype
        self.config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.heads = heads_that_vote_together(vllm_config, self.num_kv_heads)
        self.writer = _layer_that_writes(vllm_config, kv_sharing_target_layer_name, kv_cache_dtype)
        # Whether the layer rotates its queries and keys in the model's stead.
        self.reassigns_positions = self.config.method.reassigns_positions
        self.rotation: Rotation | None = None
        self.took_rotation = False
        self.follows, self.followers = Role()
        self.took_role = False
        self.attends_with = ""
        self.selections: SelectionCacheState | None = None
        if torch.get_default_device().type != "meta":  # where a model is only looked at
            self.prepare(vllm_config)

    @abstractmethod
    def prepare(self, vllm_config: VllmConfig) -> None:
        """Allocate and compile what the layer needs, before vLLM measures the memory that is left."""

    def take_rotation(self, table: torch.Tensor | None) -> None:
        """Take over the rotation of this layer's queries and keys, which come without from now on.

        Args:
            table: [positions, rotated] of the rotary embedding, on the layer's device; None for a layer
                without positions, which rotates nothing.
        """
        method = self.config.method
        if table is not None:
            self.rotation = _rotation(table, method.max_attended, method.n_local)
        self.took_rotation = True

    def take_role(self, role: Role) -> None:
        """Become an anchor, or a layer that follows one and needs no Selection Cache."""
        self.took_role = True
        self.follows, self.followers = role
        if role.follows:
            self.selections = None

    def layer_rotation(self) -> Rotation | None:
        """The layer's rotation; None where positions are native, or where the layer has none.

        Raises:
            SettingsError: when nobody took the rotation over for the layer.
        """
        if self.reassigns_positions and not self.took_rotation:
            raise SettingsError(
                "tokenselect positions='reassigned' cannot be used with this --load-format, which does "
                "not load models as vLLM's other loaders do. Use another one, or leave positions out."
            )
        return self.rotation

    def selection_cache(
        self, vllm_config: VllmConfig, device: torch.device
    ) -> SelectionCacheState | None:
        """The layer's part of the Selection Cache; None if it is switched off."""
        method = self.config.method
        if not method.reuses_selections:
            return None
        return SelectionCacheState.allocate(
            vllm_config.scheduler_config.max_num_seqs,
            method.selection_size,
            num_voting_heads(self.num_heads, self.heads),
            self.head_size,
            self.dtype,
            device,
        )


def _layer_that_writes(vllm_config: VllmConfig, target: str | None, kv_cache_dtype: str) -> Any:
    """The earlier layer whose keys and values a layer reads in place of its own; None without one.

    Raises:
        SettingsError: where that layer caches them in another way.
    """
    if target is None:
        return None
    layer: Any = vllm_config.compilation_config.static_forward_context[target]
    if not isinstance(layer.impl, TokenSelectImpl) or layer.kv_cache_dtype != kv_cache_dtype:
        refuse_model(
            f"a layer reads the keys and values of {target}, which caches them as "
            f"{layer.attn_backend.get_name()} with --kv-cache-dtype {layer.kv_cache_dtype} does"
        )
    return layer


@cache
def _rotation(table: torch.Tensor, num_positions: int, n_local: int) -> Rotation:
    """Layers that had the same rotary embedding share one rotation."""
    return Rotation.from_table(table, num_positions, n_local)
