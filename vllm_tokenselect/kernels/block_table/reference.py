"""Selection into the sparse block table, readable: sink, the top-k by vote, local."""

from __future__ import annotations

import torch


def build_sparse_block_table(
    votes: torch.Tensor | None,
    block_table: torch.Tensor,
    row_seq: torch.Tensor,
    n_init: int,
    top_k: int,
    candidate_ends: torch.Tensor,
    context_ends: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write the slots of the attended positions of every row, ascending by position.

    Args:
        votes: fp32 [R, N], vote of candidate `n_init + i`; None when every row is dense.
        block_table: int32 [S, W].
        row_seq: int32 [R].
        n_init, top_k: sink and selected tokens.
        candidate_ends: int32 [R], one past the last candidate. A row with no more than `top_k`
            candidates is dense: it gets its whole context.
        context_ends: int32 [R], one past the last position that a row may attend to.
        block_size: tokens of a KV block.
        slots: int32 [R, width], written up to each row's length.
        lengths: int32 [R], written.
    """
    for row in range(len(row_seq)):
        candidate_end, context_end = int(candidate_ends[row]), int(context_ends[row])
        num_candidates = candidate_end - n_init
        if num_candidates <= top_k:
            positions = torch.arange(context_end)
        else:
            assert votes is not None
            # A stable sort keeps the lower position first among equal votes.
            order = votes[row, :num_candidates].sort(descending=True, stable=True).indices
            selected = order[:top_k].sort().values + n_init
            positions = torch.cat(
                [torch.arange(n_init), selected, torch.arange(candidate_end, context_end)]
            )
        blocks = block_table[int(row_seq[row])][positions // block_size]
        slots[row, : len(positions)] = blocks * block_size + positions % block_size
        lengths[row] = len(positions)
