"""Paged scoring, readable: every row's mean query against the keys of its candidates."""

from __future__ import annotations

import torch


def score_paged_keys(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    start: int,
    ends: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Scaled dot products of mean queries and cached keys, read through the block table.

    Args:
        query: fp32 [R, Hq, D], mean query of each row.
        kv_cache: [num_blocks, Hkv, 2, block_size, D].
        block_table: int32 [S, W], KV blocks of each request.
        row_seq: int32 [R], row of `block_table` that a row reads.
        start: position of the first candidate.
        ends: int32 [R], position one past the last candidate of each row; at most `start`: none.
        scale: scale of q . k.

    Returns:
        fp32 [R, Hq, N], N = max(ends) - start (0 without candidates); `-inf` from a row's end on.
        Query head h reads KV head `h // (Hq / Hkv)`.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    width = max(int(ends.max()) - start, 0) if num_rows else 0
    logits = torch.full((num_rows, num_heads, width), float("-inf"))
    for row in range(num_rows):
        positions = torch.arange(start, max(int(ends[row]), start))
        blocks = block_table[int(row_seq[row])][positions // block_size].long()
        keys = kv_cache[blocks, :, 0, positions % block_size].float()  # [n, Hkv, D]
        grouped = query[row].view(num_kv_heads, -1, head_size)  # [Hkv, G, D]
        scores = torch.einsum("kgd,nkd->kgn", grouped, keys) * scale
        logits[row, :, : len(positions)] = scores.reshape(num_heads, -1)
    return logits
