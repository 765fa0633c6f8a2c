"""Soft vote, readable: every head spreads one vote over the candidates."""

from __future__ import annotations

import torch


def soft_vote(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the candidates for each head, summed over the heads.

    Args:
        logits: fp32 [R, Hq, N], `-inf` where there is no candidate.

    Returns:
        fp32 [R, N]; a row without candidates gets zeros.
    """
    votes = torch.softmax(logits, dim=-1).sum(dim=1)
    return votes.nan_to_num(0.0)
