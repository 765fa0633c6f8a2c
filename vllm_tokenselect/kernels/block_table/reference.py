"""Readable definition of the sparse block table."""

from __future__ import annotations

import torch


def order_keys(votes: torch.Tensor) -> torch.Tensor:
    """Integers in the order of votes `>= 0`, as they are compared; NaN (and -0) count as zero."""
    return votes.nan_to_num(nan=0.0, posinf=torch.inf).add(0.0).view(torch.int32) >> 16


def build_sparse_block_table(
    votes: torch.Tensor | None,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    n_init: int,
    top_k: torch.Tensor,
    candidate_ends: torch.Tensor,
    context_ends: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write which cached tokens every row attends to: a block table of page size 1.

    A row attends to `[0, n_init)`, to the `top_k[r]` candidates of `[n_init, candidate_ends[r])` with the
    highest votes (ties go to the lower position) and to `[candidate_ends[r], context_ends[r])`, in
    order of position. With no more candidates than that it is all of `[0, context_ends[r])`.

    Votes are compared in 16 bits (bfloat16, rounded towards zero): equal keys, as un-rotated keys of equal
    tokens are in the first layer, have equal votes but for rounding, and that must not decide.

    Args:
        votes: fp32 [R, N], `>= 0`; of row `r` only the first `candidate_ends[r] - n_init` are read.
            NaN counts as the lowest vote. None when no row has more candidates than it keeps.
        block_table: int32 [S, W], KV blocks of each request.
        row_seq: int32 [R], the line of `block_table` that a row reads.
        n_init: length of the sink.
        top_k: int32 [R], candidates to keep.
        candidate_ends: int32 [R], end of the candidates (exclusive).
        context_ends: int32 [R], end of the row's own tokens (exclusive).
        block_size: tokens of a KV block.
        slots: int32 [R, width], written up to each row's length, the rest left as it is.
        lengths: int32 [R], written.
    """
    device = slots.device
    columns = (row_seq, top_k, candidate_ends, context_ends)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for row, (seq, wanted, candidate_end, context_end) in enumerate(rows):
        num_candidates = candidate_end - n_init
        if num_candidates <= wanted:
            positions = torch.arange(context_end, device=device)
        else:
            assert votes is not None
            keys = order_keys(votes[row, :num_candidates])
            best = keys.sort(descending=True, stable=True).indices[:wanted]
            positions = torch.cat(
                [
                    torch.arange(n_init, device=device),
                    n_init + best.sort().values,
                    torch.arange(candidate_end, context_end, device=device),
                ]
            )
        blocks = block_table[seq, positions // block_size]
        slots[row, : len(positions)] = blocks * block_size + positions % block_size
        lengths[row] = len(positions)
