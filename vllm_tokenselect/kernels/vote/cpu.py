"""Soft vote on a CPU: one pass of exponentials in place, and one that weighs and adds up the heads.

A head's scores are cut into parts of a fixed size, each normalized by its own maximum first: the parts
are work for all threads, and a row's votes never depend on its neighbors.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_vectors import exponential, exponentials, largest

PART_TOKENS = 1024


def soft_vote(logits: torch.Tensor) -> torch.Tensor:
    """As `reference.soft_vote`; overwrites `logits`, which is contiguous."""
    votes = torch.empty((logits.shape[0], logits.shape[2]), dtype=torch.float32)
    if logits.numel():
        vote_rows(logits.numpy(), votes.numpy())
    return votes


@compile_once(parallel=True)
def vote_rows(scores, votes):
    """`votes[r] = sum over h of softmax(scores[r, h])`, fp32 [R, Hq, N] -> fp32 [R, N]."""
    num_rows, num_heads, width = scores.shape
    num_parts = (width + PART_TOKENS - 1) // PART_TOKENS
    maxima = np.empty((num_rows, num_heads, num_parts), np.float32)
    totals = np.empty((num_rows, num_heads, num_parts), np.float32)
    for work in prange(num_rows * num_heads * num_parts):
        part, line = work % num_parts, work // num_parts
        row, head = line // num_heads, line % num_heads
        own = scores[row, head, part * PART_TOKENS : (part + 1) * PART_TOKENS]  # [tokens]
        highest = largest(own)
        total = np.float32(0)
        if highest > -np.inf:
            total = exponentials(own, highest)
        maxima[row, head, part], totals[row, head, part] = highest, total
    for work in prange(num_rows * num_parts):
        _add_heads(scores, maxima, totals, work // num_parts, work % num_parts, votes)


@njit(error_model="numpy")  # a NaN among the scores is no error
def _add_heads(scores, maxima, totals, row, part, votes):
    """Votes of one part of a row: every head's exponentials, times what they are of its whole."""
    votes_of_part = votes[row, part * PART_TOKENS : (part + 1) * PART_TOKENS]  # [tokens]
    votes_of_part[:] = 0
    for head in range(scores.shape[1]):
        if maxima[row, head, part] == -np.inf:
            continue  # no candidate of the row is in this part
        highest = largest(maxima[row, head])
        total = np.float32(0)
        for other in range(maxima.shape[2]):
            if maxima[row, head, other] > -np.inf:
                share = exponential(maxima[row, head, other] - highest)
                total += totals[row, head, other] * share
        weight = exponential(maxima[row, head, part] - highest) / total
        own = scores[row, head, part * PART_TOKENS : (part + 1) * PART_TOKENS]  # [tokens]
        for token in range(len(own)):
            votes_of_part[token] += weight * own[token]
