"""Readable definition of a row's mean query (TokenSelect, arXiv 2411.02886, section 3.3)."""

from __future__ import annotations

import torch


def mean_queries(
    query: torch.Tensor, query_start: torch.Tensor, query_len: torch.Tensor
) -> torch.Tensor:
    """Average the queries of every row.

    Args:
        query: fp32, bf16 or fp16 [T, Hq, D].
        query_start: int32 [R], first query of each row in `query`.
        query_len: int32 [R], number of queries; 0 for a padded row.

    Returns:
        fp32 [R, Hq, D]; a padded row is all zeros.
    """
    means = query.new_zeros((len(query_start), *query.shape[1:]), dtype=torch.float32)
    rows = zip(query_start.tolist(), query_len.tolist(), strict=True)
    for row, (start, length) in enumerate(rows):
        if length:
            means[row] = query[start : start + length].mean(dim=0, dtype=torch.float32)
    return means
