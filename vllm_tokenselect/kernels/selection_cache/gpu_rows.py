"""The rows of a step, as the kernels of the Selection Cache take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A kernel is compiled once, not again for every number that 16 happens to divide.
NUMBERS = ["n_init", "start", "refresh_interval", "num_rows", "followers"]
ROW_ARRAYS = [
    "query_start",
    "own_start",
    "chains",
    "row_seq",
    "row_seats",
    "cached_seats",
    "owners",
    "query_len",
    "top_k",
]
END_ARRAYS = ["candidate_ends", "context_ends", "scored_ends", "table_ends", "reused_ends"]


@dataclass(frozen=True)
class RowArrays:
    """Of every row where it lies, what it does, and what was decided.

    Attributes:
        row_seq: int32 [R], the row's request.
        query_len: int32 [R]; 0 for a padded row.
        top_k: int32 [R], candidates that the row selects; one with no more candidates neither reuses a
            selection nor becomes the last. Where rows of a chain select, its last one does.
        seat: int32 [R], of the row's request; -1 for a padded row and where there is no request: it does
            not count.
        cached_seat: int32 [R], the same of a row that takes part; -1 of any other.
        owner: int32 [R], of the seat of a row that takes part.
        candidate_end: int32 [R], `a - n_local`.
        context_end: int32 [R], `b`; 0 for a padded row.
        scored_end: int32 [R], where the candidates end that are scored: `candidate_end` of a row that
            selects, `n_init` of any other.
        table_end: int32 [R], `context_end`, or 0 for a row that reuses a selection.
        reused_end: int32 [R], where the candidates of the reused selection ended; -1 for a row that
            reuses none.
        chains: int32 [chains, 2], the rows that take part: each run of rows of one request is a line: first
            row, number of rows. Such rows have one query each, and no two chains have one seat. A chain
            without rows is left out.

    Every layer writes `scored_end`, `table_end` and `reused_end` of the rows of chains anew.
    """

    row_seq: torch.Tensor
    query_len: torch.Tensor
    top_k: torch.Tensor
    seat: torch.Tensor
    cached_seat: torch.Tensor
    owner: torch.Tensor
    candidate_end: torch.Tensor
    context_end: torch.Tensor
    scored_end: torch.Tensor
    table_end: torch.Tensor
    reused_end: torch.Tensor
    chains: torch.Tensor
