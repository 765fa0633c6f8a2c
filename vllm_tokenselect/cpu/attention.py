"""Queries + sparse block table -> output.

Rows of one query select and attend in place; rows of several are gathered into a contiguous buffer and
handed to a library's attention with a causal mask aligned to the lower right. That is exact: every
selected token precedes the row's own queries.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from vllm_tokenselect.cpu.step import StepSelection
from vllm_tokenselect.kernels.attend.reference import attention_weights, cap_scores
from vllm_tokenselect.kernels.rotate.reference import rotate
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState


class LibraryAttention(Protocol):
    """Causal attention of a library over contiguous keys and values."""

    def __call__(
        self,
        row: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend with the mask aligned to the lower right: the last query sees every key.

        Args:
            row: the row of the plan, for what a library prepares once a step.
            query: [n, Hq, D].
            keys, values: [m, Hkv, D], m >= n.
            out: [n, Hq, D], written.
        """


class SdpaAttention:
    """PyTorch's scaled_dot_product_attention, or the definition with sinks or a cap; needs torch only.

    Args:
        scale: scale of q . k.
        sinks: [Hq], a logit of each head in the softmax's denominator.
        soft_cap: of the scores, 0 for none.
    """

    def __init__(
        self, scale: float, sinks: torch.Tensor | None = None, soft_cap: float = 0.0
    ) -> None:
        self.scale = scale
        self.sinks = sinks
        self.soft_cap = soft_cap

    def __call__(
        self,
        row: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        n, m = len(query), len(keys)
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        if self.sinks is not None or self.soft_cap:
            self._attend_by_definition(query, keys, values, mask, out)
            return
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=True,
        )
        out.copy_(attended[0].transpose(0, 1))

    def _attend_by_definition(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        group = query.shape[1] // keys.shape[1]
        keys, values = (part.float().repeat_interleave(group, dim=1) for part in (keys, values))
        scores = torch.einsum("nhd,mhd->hnm", query.float(), keys) * self.scale
        weights = attention_weights(cap_scores(scores, self.soft_cap), mask, self.sinks)
        out.copy_(torch.einsum("hnm,mhd->nhd", weights, values))


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    step: StepSelection,
    state: SelectionCacheState | None,
    scale: float,
    library: LibraryAttention,
    scratch: torch.Tensor,
    out: torch.Tensor,
    rotation: Rotation | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend every row of the step to the tokens that its row of the table names.

    Args:
        query: [T, Hq, D].
        kv_cache: [num_blocks, Hkv, 2, block_size, D].
        step: the step's sparse block table, filled for this layer.
        state: the layer's part of the Selection Cache, if there is one.
        scale: scale of q . k.
        library: attention for rows of several queries, with the same sinks and cap.
        scratch: [2, m, Hkv, D] of the cache's dtype, overwritten; m is the longest row's length.
        out: [T, Hq, D], written.
        rotation: the layer's, if positions are reassigned: queries and keys are not rotated yet.
        sinks: [Hq], a logit of each head in the softmax's denominator; None for none.
        soft_cap: of the scores, `cap * tanh(score / cap)`; 0 for none.
    """
    plan = step.plan
    step.counts += step.fixed_counts
    for single_queries in step.single_queries:
        single_queries(query, kv_cache, scale, out, state, rotation, sinks, soft_cap)
    for row in step.several_queries:
        length = int(step.lengths[row])
        keys, values = scratch[0, :length], scratch[1, :length]
        start, count = int(plan.query_start[row]), int(plan.query_len[row])
        queries = slice(start, start + count)
        asking, cos_sin = query[queries], None
        if rotation is not None:
            cos_sin = rotation.cos_sin
            asking = rotate(asking, cos_sin[length - count : length])
        step.operations.gather_tokens(kv_cache, step.slots[row, :length], keys, values, cos_sin)
        library(row, asking, keys, values, out[queries])
