"""Attention over the sparse block table, readable."""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend each row's queries to the tokens of its row of the table.

    Args:
        query: [T, Hq, D].
        query_start_loc: int32 [R + 1], where each row's queries start.
        kv_cache: [num_blocks, Hkv, 2, block_size, D].
        slots: int32 [R, width]; lengths: int32 [R].
        scale: scale of q . k.
        out: [T, Hq, D], written. The causal mask is aligned to the lower right: a row's last query
            sees every token of the row. A row of length 0 gives zeros.
    """
    num_kv_heads, block_size, head_size = kv_cache.shape[1], *kv_cache.shape[3:]
    for row in range(len(lengths)):
        first, last, m = int(query_start_loc[row]), int(query_start_loc[row + 1]), int(lengths[row])
        n = last - first
        slot = slots[row, :m].long()
        kv = kv_cache[slot // block_size, :, :, slot % block_size].float()  # [m, Hkv, 2, D]
        grouped = query[first:last].float().view(n, num_kv_heads, -1, head_size)
        scores = torch.einsum("nkgd,mkd->nkgm", grouped, kv[:, :, 0]) * scale
        visible = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        scores.masked_fill_(~visible[:, None, None], float("-inf"))
        attended = torch.einsum("nkgm,mkd->nkgd", scores.softmax(-1).nan_to_num(0.0), kv[:, :, 1])
        out[first:last] = attended.reshape(n, -1, head_size).to(out.dtype)


def attend_single_queries(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`attend` for rows of one query each: query and out [R, Hq, D]."""
    query_start_loc = torch.arange(len(query) + 1, dtype=torch.int32)
    attend(query, query_start_loc, kv_cache, slots, lengths, scale, out)
