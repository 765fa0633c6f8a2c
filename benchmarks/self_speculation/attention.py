"""How drafts attend, and how tokens that are verified do; both by PyTorch's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_tokenselect.tools.inspect.selections import Chunk, by_votes

N_INIT = 16


def attend_in_full(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last n of T tokens; the heads of a group are rows, so keys are read once.

    Shapes as `inspect.model.Attention` says.
    """
    heads, rows, size = query.shape
    grouped = query.reshape(len(key), -1, size)  # [Hkv, Hq / Hkv * n, D]
    mask = None
    if rows > 1:
        width = key.shape[1]
        mask = torch.ones(rows, width, dtype=torch.bool).tril(width - rows)
        mask = mask.repeat(heads // len(key), 1)
    out = F.scaled_dot_product_attention(
        grouped[None], key[None], value[None], attn_mask=mask, scale=scale
    )
    return out[0].reshape(heads, rows, size)


class DraftAttention:
    """Attention of one generated token after the other to the sink, what was selected, and the last tokens.

    A quarter of the budget is the local window, which grows by the tokens of a round.

    Args:
        budget: tokens that the first draft of a round attends to.
        selects: "each" draft selects, the "first" of a round does, or "none": a longer local window.
    """

    def __init__(self, budget: int, selects: str) -> None:
        self._selects = selects
        self._n_local = budget // 4 if selects != "none" else budget - N_INIT
        self._top_k = budget - N_INIT - self._n_local
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}  # by layer: positions, and their end

    def begin_round(self) -> None:
        """Forget what drafts have selected."""
        self._seen.clear()

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        width = key.shape[1]
        if layer not in self._seen or self._selects == "each":
            self._seen[layer] = self._select(query, key, scale), width
        positions, end = self._seen[layer]
        seen = torch.cat([positions, torch.arange(end, width)])
        return attend_in_full(layer, query, key[:, seen], value[:, seen], scale)

    def _select(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        width = key.shape[1]
        local = width - self._n_local
        if local - N_INIT <= self._top_k:
            return torch.arange(width)
        parts = [torch.arange(N_INIT), torch.arange(local, width)]
        if self._top_k:
            chunk = Chunk(width - 1, width, range(N_INIT, local), self._top_k)
            parts.insert(1, by_votes([chunk], query, key, scale)[0])
        return torch.cat(parts)
