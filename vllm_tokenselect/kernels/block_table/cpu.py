"""Sparse block table on a CPU: a radix selection, one thread a row."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from vllm_tokenselect.kernels.cpu_arrays import int32_array
from vllm_tokenselect.kernels.cpu_cache import compile_once

KEY_BITS, DIGIT_BITS = 16, 11  # in two passes
_NO_VOTES = np.empty((0, 0), np.float32)
_INFINITY = np.uint32(0x7F800000)


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
    """As `reference.build_sparse_block_table`; `slots` and `lengths` are contiguous.

    Raises:
        ValueError: a row has more than `top_k` candidates and `votes` is None.
    """
    ends, most = int32_array(candidate_ends), int32_array(top_k)
    if votes is None and (ends - n_init > most).any():
        row = int(np.argmax(ends - n_init > most))
        raise ValueError(
            f"{ends[row] - n_init} candidates for top_k={most[row]} need votes, got None"
        )
    build_rows(
        np.arange(len(ends)),
        _NO_VOTES if votes is None else votes.contiguous().numpy(),
        int32_array(block_table),
        int32_array(row_seq),
        n_init,
        most,
        ends,
        int32_array(context_ends),
        block_size,
        slots.numpy(),
        lengths.numpy(),
    )


@compile_once(parallel=True)
def build_rows(
    rows,
    votes,
    block_table,
    row_seq,
    n_init,
    top_k,
    candidate_ends,
    context_ends,
    block_size,
    slots,
    lengths,
):
    """Lines `rows` of the table, each with a line of `votes`; the other arrays have every row."""
    for index in prange(len(rows)):
        row = rows[index]
        seq, candidate_end, context_end = row_seq[row], candidate_ends[row], context_ends[row]
        num_candidates, wanted = candidate_end - n_init, top_k[row]
        if num_candidates <= wanted:
            write_range(block_table, seq, 0, context_end, block_size, slots, row, 0)
            lengths[row] = context_end
        else:
            write_range(block_table, seq, 0, n_init, block_size, slots, row, 0)
            keys = votes[index, :num_candidates].view(np.uint32)  # [candidates]
            _write_best(keys, wanted, block_table, seq, n_init, block_size, slots, row)
            written = n_init + wanted
            write_range(
                block_table, seq, candidate_end, context_end, block_size, slots, row, written
            )
            lengths[row] = written + context_end - candidate_end


@njit
def write_range(block_table, seq, first, last, block_size, slots, row, entry):
    """Write the slots of positions [first, last) from `entry` on."""
    position = first
    while (
        position < last
    ):  # block by block: a division for every token would cost more than the rest
        offset = position % block_size
        slot = block_table[seq, position // block_size] * block_size + offset
        for i in range(min(block_size - offset, last - position)):
            slots[row, entry + i] = slot + i
        entry += min(block_size - offset, last - position)
        position += block_size - offset


@njit
def _write_best(keys, top_k, block_table, seq, n_init, block_size, slots, row):
    """Write the slots of the `top_k` candidates with the highest votes, in order of position.

    `keys` are the bits of the candidates' votes.
    """
    threshold, num_ties = _find_threshold(keys, top_k)
    entry, position, end = n_init, n_init, n_init + len(keys)
    while position < end:
        offset = position % block_size
        slot = block_table[seq, position // block_size] * block_size + offset
        for i in range(min(block_size - offset, end - position)):
            key = _order_key(keys[position - n_init + i])
            # Written first, kept or not: what follows overwrites it, and nothing waits for a branch.
            slots[row, entry] = slot + i
            is_tie = key == threshold and num_ties > 0
            num_ties -= is_tie
            entry += is_tie or key > threshold
        position += block_size - offset


@njit
def _order_key(bits):
    """Votes are not negative, so their first bits order as they do; NaN (and -0) count as zero."""
    return bits >> np.uint32(32 - KEY_BITS) if bits <= _INFINITY else np.uint32(0)


@njit
def _find_threshold(keys, top_k):
    """The `top_k`-th highest key, and how many of the candidates equal to it are kept."""
    histogram = np.empty(1 << DIGIT_BITS, np.int64)
    prefix, wanted = np.uint32(0), top_k
    shift = KEY_BITS
    while shift > 0:
        bits = min(DIGIT_BITS, shift)
        shift -= bits
        mask = np.uint32((1 << bits) - 1)
        histogram[:] = 0
        for index in range(len(keys)):
            histogram[(_order_key(keys[index]) >> np.uint32(shift)) & mask] += 1
        digit = (1 << bits) - 1
        while histogram[digit] < wanted:
            wanted -= histogram[digit]
            digit -= 1
        prefix = np.uint32(np.uint32(prefix << np.uint32(bits)) | np.uint32(digit))
        keys = _with_prefix(keys, shift, prefix, histogram[digit])
    return prefix, wanted


@njit
def _with_prefix(keys, shift, prefix, count):
    """The `count` keys whose digits above `shift` are `prefix`."""
    found = np.empty(count, np.uint32)
    entry = 0
    for index in range(len(keys)):
        if _order_key(keys[index]) >> np.uint32(shift) == prefix:
            found[entry] = keys[index]
            entry += 1
    return found
