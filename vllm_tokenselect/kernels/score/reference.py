"""Readable definition of the scores: `scale * q . k` of a row's candidates, straight from the blocks."""

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
    """Scores of the candidates `[start, ends[r])` of every row `r`.

    Args:
        query: fp32 [R, Hq, D], one query a row (the mean over its chunk).
        kv_cache: fp32, bf16 or fp16 [num_blocks, Hkv, 2, block_size, D], contiguous.
        block_table: int32 [S, W], KV blocks of each request.
        row_seq: int32 [R], the line of `block_table` that a row reads.
        start: first candidate position, the same for all rows.
        ends: int32 [R], end of a row's candidates (exclusive); `<= start` where it has none.
        scale: the attention's own scale of q . k.

    Returns:
        fp32 [R, Hq, N], `N = max(max(ends) - start, 0)`; `-inf` from a row's own end on.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    width = max(int(ends.max()) - start, 0) if num_rows else 0
    logits = query.new_full((num_rows, num_heads, width), float("-inf"))
    for row, (seq, end) in enumerate(zip(row_seq.tolist(), ends.tolist(), strict=True)):
        if end <= start:
            continue
        positions = torch.arange(start, end, device=query.device)
        blocks = block_table[seq, positions // block_size].long()
        keys = kv_cache[blocks, :, 0, positions % block_size].float()  # [n, Hkv, D]
        grouped = query[row].view(num_kv_heads, -1, head_size)  # [Hkv, G, D]
        scores = torch.einsum("hgd,nhd->hgn", grouped, keys) * scale
        logits[row, :, : end - start] = scores.reshape(num_heads, -1)
    return logits
