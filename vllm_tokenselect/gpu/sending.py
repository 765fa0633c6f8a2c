"""How the rows of a step reach the device: the host packs one array, which takes one copy.

What follows from the contexts' real lengths, which only the device knows, is computed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_tokenselect.gpu.cutting import GroupCut
from vllm_tokenselect.kernels.selection_cache.state import SELECTS
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import NO_SEAT, Int32
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method

# Numbers that the host sends of a row, and that the device computes of it.
FIELDS, COMPUTED = 8, 6
# Entries of all that the host sends of a row: its numbers, a tile, a chain, and where its queries and its
# columns start (one more of each for each group, of which there are no more than rows).
SENT = (FIELDS, 3, 2, 2, 2)


class RowBuffers:
    """Device arrays for the rows of a step.

    Args:
        capacity: most rows.
        device: where the arrays lie.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        size = _field_size(capacity)
        self.sent = torch.zeros(sum(SENT) * size, dtype=torch.int32, device=device)
        self.computed = torch.zeros(COMPUTED * size, dtype=torch.int32, device=device)


class DeviceRows(NamedTuple):
    """The rows of a step on the device; see `rows.RowGroup`.

    `ends` is int32 [5, R]: `candidate_end`, `context_end`, `scored_end`, `table_end` and `reused_end`. The
    tiles and the chains of a group lie from its first row on.
    """

    row_seq: torch.Tensor
    query_len: torch.Tensor
    top_k: torch.Tensor
    seat: torch.Tensor
    cached_seat: torch.Tensor
    owner: torch.Tensor
    ends: torch.Tensor
    tiles: torch.Tensor
    chains: torch.Tensor
    query_start_loc: torch.Tensor
    columns: torch.Tensor


def pack_rows(
    plan: SelectionPlan,
    seq_lens: Int32,
    groups: Sequence[GroupCut],
    num_rows: int,
    method: Method,
) -> Int32:
    """Everything that the host sends of a step.

    Args:
        seq_lens: int32 [S], an upper bound of every context; what the plan was built from.
        num_rows: of the groups; those that the plan lacks are padded rows.
        method: the settings.
    """
    packed = np.zeros(sum(SENT) * _field_size(num_rows), np.int32)
    fields, tiles, chains, starts, columns = _split(packed, num_rows)
    row_seq, query_len, after, top_k, dense_end, seat, cached_seat, owner = fields
    rows = slice(plan.num_rows)
    row_seq[rows] = plan.row_seq
    query_len[rows] = plan.query_len
    after[rows] = seq_lens[plan.row_seq] - plan.chunk_end
    top_k[rows] = plan.top_k
    dense_end[rows] = plan.generated * method.min_context
    seat[:] = NO_SEAT
    seat[rows] = plan.seat
    cached_seat[:] = NO_SEAT
    cached_seat[rows] = np.where(plan.caches, plan.seat, NO_SEAT)
    owner[rows] = plan.owner
    for number, group in enumerate(groups):
        chains[group.first :][: len(group.chains)] = group.chains
        # Each group has one entry more than rows.
        own = slice(group.first + number, group.last + number + 1)
        starts[own] = group.query_start_loc
        columns[own] = group.columns
        if group.tiles:
            table = np.concatenate([each.table for each in group.tiles])
            tiles[group.first :][: len(table)] = table
    return packed


def send_rows(
    packed: Int32, num_rows: int, buffers: RowBuffers, seq_lens: torch.Tensor, method: Method
) -> DeviceRows:
    """Copy what was packed into the buffers, and compute there what depends on the contexts' lengths.

    Args:
        buffers: for at least `num_rows` rows; overwritten.
        seq_lens: int32 [S] on the device, the contexts' real lengths.
    """
    source = torch.from_numpy(packed)
    if buffers.sent.is_cuda:
        source = source.pin_memory()  # a copy from pageable memory would wait for the device
    sent = buffers.sent[: len(source)]
    sent.copy_(source, non_blocking=True)
    fields, tiles, chains, starts, columns = _split(sent, num_rows)
    row_seq, query_len, after, top_k, dense_end, seat, cached_seat, owner = fields
    # As `SelectionPlan.build`, of the real lengths: `after` is how far a row ends before its request does.
    context_end = (seq_lens[row_seq.long()] - after) * (query_len > 0)
    if method.min_context:
        top_k = torch.where(context_end <= dense_end, FULL_ATTENTION, top_k)
    candidate_end = context_end - query_len - method.n_local
    selects = candidate_end - method.n_init > top_k
    scored_end = torch.where(selects, candidate_end, method.n_init)
    reused_end = torch.full_like(context_end, SELECTS)
    computed = buffers.computed[: COMPUTED * len(row_seq)].view(COMPUTED, -1)
    ends = candidate_end, context_end, scored_end, context_end, reused_end
    torch.stack([*ends, top_k], out=computed)
    return DeviceRows(
        row_seq,
        query_len,
        computed[5],
        seat,
        cached_seat,
        owner,
        computed[:5],
        tiles,
        chains,
        starts,
        columns,
    )


def _field_size(num_rows: int) -> int:
    """Entries of a field: one more than rows, and a multiple of 16 bytes."""
    return -(-(num_rows + 1) // 4) * 4


def _split(sent: Any, num_rows: int) -> tuple[Any, Any, Any, Any, Any]:
    """Fields, tiles, chains, and starts of queries and of columns, in an array or tensor that is sent."""
    size = _field_size(num_rows)
    ends = [size * entries for entries in accumulate(SENT, initial=0)]
    fields, tiles, chains, starts, columns = (sent[first:end] for first, end in pairwise(ends))
    return (
        fields.reshape(FIELDS, size),
        tiles.reshape(-1, 3),
        chains.reshape(-1, 2),
        starts,
        columns,
    )
