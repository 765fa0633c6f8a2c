"""Readable definition of the rotation; in PyTorch alone, and so for any device."""

from __future__ import annotations

import torch


def rotate(vectors: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the vectors of all heads.

    Args:
        vectors: [n, H, D]; computed in fp32 whatever the dtype.
        cos_sin: fp32 [n, rotated] or [1, rotated], as in `Rotation.cos_sin`: a line for each `n`.

    Returns:
        [n, H, D] of the dtype of `vectors`.
    """
    rotated = cos_sin.shape[1]
    cosine, sine = cos_sin[:, None].chunk(2, dim=-1)  # [n, 1, rotated / 2]
    first, second = vectors[..., :rotated].float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return torch.cat([turned.to(vectors.dtype), vectors[..., rotated:]], dim=-1)


def rotate_queries(
    query: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    lengths: torch.Tensor,
    cos_sin: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Rotate the queries of every row to the last of its positions.

    Args:
        query: fp32, bf16 or fp16 [T, Hq, D].
        query_start: int32 [R], first query of each row in `query`.
        query_len: int32 [R], number of queries; 0 for a padded row.
        lengths: int32 [R], tokens that the row attends to, its own included; 0 for a row that is to
            be left out.
        cos_sin: fp32 [positions, rotated], as in `Rotation.cos_sin`.
        out: [T, Hq, D] of the dtype of `query`, written for the rows' queries.
    """
    rows = zip(query_start.tolist(), query_len.tolist(), lengths.tolist(), strict=True)
    for start, count, length in rows:
        if length:
            queries = slice(start, start + count)
            out[queries] = rotate(query[queries], cos_sin[length - count : length])
