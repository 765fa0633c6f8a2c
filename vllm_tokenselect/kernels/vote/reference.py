"""Readable definition of the soft vote (TokenSelect, arXiv 2411.02886, section 3.2)."""

from __future__ import annotations

import torch


def soft_vote(logits: torch.Tensor) -> torch.Tensor:
    """Criticality of the candidates: softmax over them for each head, then the sum over heads.

    Softmax first, so that every head has one vote however large its scores are.

    Args:
        logits: fp32 [R, Hq, N], `-inf` where a row has no candidate.

    Returns:
        fp32 [R, N], `>= 0`; a row without candidates is all zeros.
    """
    empty = torch.isneginf(logits).all(dim=-1, keepdim=True)  # [R, Hq, 1]
    return logits.softmax(dim=-1).masked_fill(empty, 0.0).sum(dim=1)
