"""Sparse block table on a GPU: a radix selection.

Votes are not negative, so their first 16 bits order as they do. Two passes over a row's votes count
digits and find those bits of the `top_k`-th highest vote; what is above it is written, and of what
equals it the lowest positions, in order of position. Votes of a step lie in the L2 cache, which is why a
row is read several times rather than sorted.

One program does a whole row where there are rows enough to fill the GPU, or few votes; a long row is
cut into parts, whose programs add up their counts between the passes.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import INTERPRETED, num_programs_wanted

DIGIT_BITS = (11, 5)
COUNTS = sum(1 << bits for bits in DIGIT_BITS)
TOKENS_PER_STEP = 2048 if INTERPRETED else 4096
MAX_PARTS = 64
# A kernel is compiled once, not again for every number that 16 happens to divide.
NUMBERS = ["n_init"]
ROW_ARRAYS = ["row_seq", "top_k", "candidate_ends", "context_ends"]
TOKENS_PER_PART = 32768  # fewer are done sooner by one program than by several that meet five times


class TableScratch:
    """What the programs of a row tell each other.

    Args:
        rows: most rows of a call.
        device: where it lies.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.counts = torch.zeros((rows, COUNTS), dtype=torch.int32, device=device)
        self.kept = torch.zeros((rows, 2, MAX_PARTS), dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        return self.counts.nbytes + self.kept.nbytes


def choose_parts(num_rows: int, width: int) -> int:
    """Programs of a row."""
    wanted = triton.cdiv(num_programs_wanted(), max(num_rows, 1))
    parts: int = min(wanted, MAX_PARTS, triton.cdiv(width, TOKENS_PER_PART))
    return max(parts, 1)


def num_launches(num_rows: int, width: int, selects: bool) -> int:
    """Kernels that `build_sparse_block_table` launches; the reset of the counts is one."""
    if choose_parts(num_rows, width) == 1 or not selects:
        return 1
    return 1 + len(DIGIT_BITS) + 1 + 1  # reset, count each digit, count the kept, write


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
    scratch: TableScratch,
    parts: int | None = None,
) -> None:
    """As `reference.build_sparse_block_table`, for tensors on a GPU.

    A row with no more candidates than its `top_k` reads no votes. A row whose candidates and context
    end at 0, a padded one for example, gets a length of 0.

    Args:
        votes: None when no row has more candidates than its `top_k`.
        scratch: for at least as many rows, overwritten.
        parts: programs of a row, no more than `MAX_PARTS`; chosen when None.
    """
    num_rows = len(slots)
    if not num_rows:
        return
    selects = votes is not None
    if parts is None:
        parts = choose_parts(num_rows, slots.shape[1] if votes is None else votes.shape[1])
    if votes is None:
        # Never read; of the kind that votes are, so that no other kernel is compiled.
        votes = lengths.view(torch.float32)[None]
    rows: dict[str, Any] = {
        "votes": votes,
        "candidate_ends": candidate_ends,
        "top_k": top_k,
        "n_init": n_init,
        "votes_stride": votes.stride(0) if selects else 0,
        "BITS_0": DIGIT_BITS[0],
        "BITS_1": DIGIT_BITS[1],
        "TOKENS": TOKENS_PER_STEP,
        "num_warps": 8,
    }
    written: dict[str, Any] = {
        "block_table": block_table,
        "row_seq": row_seq,
        "context_ends": context_ends,
        "slots": slots,
        "lengths": lengths,
        "table_stride": block_table.stride(0),
        "slots_stride": slots.stride(0),
        "BLOCK_SIZE": block_size,
    }
    counts, grid = scratch.counts, (parts, num_rows)
    kept: dict[str, Any] = {"counts": counts, "kept": scratch.kept, "MAX_PARTS": MAX_PARTS}
    if parts == 1:
        _build[grid](**rows, **written)
        return
    if selects:
        counts[:num_rows].zero_()
        for digit in range(len(DIGIT_BITS)):
            _count_digit[grid](**rows, counts=counts, DIGIT=digit)
        _count_kept[grid](**rows, **kept)
    _write_parts[grid](**rows, **written, **kept)


@triton.jit
def _order_key(bits):
    """The first bits of votes, as integers of the same order; NaN (and -0) count as zero."""
    return tl.where((bits > 0x7F800000) | (bits < 0), 0, bits >> 16)


@triton.jit
def _load_keys(votes_line, first, last, TOKENS: tl.constexpr):
    """Order keys of the candidates [first, first + TOKENS), and which of them are below `last`."""
    token = first + tl.arange(0, TOKENS)
    visible = token < last
    # [TOKENS]
    bits = tl.load(votes_line + token, visible, 0).to(tl.int32, bitcast=True)
    return visible, _order_key(bits)


@triton.jit
def write_range(
    line, first, last, entry, slots_line, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr
):
    """Write the slots of positions [first, last) from `entry` on."""
    for position in range(first, last, TOKENS):
        token = position + tl.arange(0, TOKENS)
        visible = token < last
        # [TOKENS]
        block = tl.load(line + token // BLOCK_SIZE, visible, 0)
        slot = block * BLOCK_SIZE + token % BLOCK_SIZE
        tl.store(slots_line + entry + token - first, slot, visible)


@triton.jit
def _write_kept(
    votes_line,
    line,
    slots_line,
    first,
    last,
    n_init,
    threshold,
    ties,
    entry,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the kept candidates of [first, last): above the threshold, or of its ties the first."""
    for step in range(first, last, TOKENS):
        visible, key = _load_keys(votes_line, step, last, TOKENS)
        tie = (visible & (key == threshold)).to(tl.int32)
        kept_tie = (tie != 0) & (tl.cumsum(tie, 0) <= ties)
        kept = (visible & (key > threshold)) | kept_tie
        order = tl.cumsum(kept.to(tl.int32), 0)
        position = n_init + step + tl.arange(0, TOKENS)
        # [TOKENS]
        block = tl.load(line + position // BLOCK_SIZE, kept, 0)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slots_line + entry + order - 1, slot, kept)
        entry += tl.sum(kept.to(tl.int32), 0)
        ties -= tl.sum(kept_tie.to(tl.int32), 0)
    return entry


@triton.jit
def _histogram(
    votes_line, first, last, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr
):
    """How often each digit occurs among the candidates [first, last) that begin with `prefix`."""
    bins: tl.constexpr = 1 << BITS
    counts = tl.zeros([bins], tl.int32)
    for step in range(first, last, TOKENS):
        visible, key = _load_keys(votes_line, step, last, TOKENS)
        decided = key >> (SHIFT + BITS)
        counts += tl.histogram((key >> SHIFT) & (bins - 1), bins, visible & (decided == prefix))
    return counts


@triton.jit
def _next_digit(counts, wanted, prefix, BITS: tl.constexpr):
    """The threshold's next digit, and how many of the votes that share it are still wanted.

    `digit = max d with (sum over e >= d of counts[e]) >= wanted`.
    """
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 1 << BITS) > digit, counts, 0), 0)
    return (prefix << BITS) | digit, wanted - above


@triton.jit
def _counted_digit(counts_line, wanted, prefix, OFFSET: tl.constexpr, BITS: tl.constexpr):
    """As `_next_digit`, from the counts that all parts of a row have added up."""
    # [1 << BITS]
    counts = tl.load(counts_line + OFFSET + tl.arange(0, 1 << BITS))
    return _next_digit(counts, wanted, prefix, BITS)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _build(
    votes,
    block_table,
    row_seq,
    candidate_ends,
    context_ends,
    slots,
    lengths,
    top_k,
    n_init,
    votes_stride,
    table_stride,
    slots_stride,
    BLOCK_SIZE: tl.constexpr,
    BITS_0: tl.constexpr,
    BITS_1: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A whole row by one program, as `reference.build_sparse_block_table`."""
    row = tl.program_id(1).to(tl.int64)
    line = block_table + tl.load(row_seq + row).to(tl.int64) * table_stride
    slots_line = slots + row * slots_stride
    votes_line = votes + row * votes_stride
    candidate_end = tl.load(candidate_ends + row)
    context_end = tl.load(context_ends + row)
    num_candidates = candidate_end - n_init
    wanted = tl.load(top_k + row)
    if num_candidates <= wanted:
        write_range(line, 0, context_end, 0, slots_line, BLOCK_SIZE, TOKENS)
        tl.store(lengths + row, context_end)
    else:
        found = _histogram(votes_line, 0, num_candidates, 0, BITS_1, BITS_0, TOKENS)
        threshold, ties = _next_digit(found, wanted, 0, BITS_0)
        found = _histogram(votes_line, 0, num_candidates, threshold, 0, BITS_1, TOKENS)
        threshold, ties = _next_digit(found, ties, threshold, BITS_1)
        write_range(line, 0, n_init, 0, slots_line, BLOCK_SIZE, TOKENS)
        entry = _write_kept(
            votes_line,
            line,
            slots_line,
            0,
            num_candidates,
            n_init,
            threshold,
            ties,
            n_init,
            BLOCK_SIZE,
            TOKENS,
        )
        write_range(line, candidate_end, context_end, entry, slots_line, BLOCK_SIZE, TOKENS)
        tl.store(lengths + row, entry + context_end - candidate_end)


@triton.jit
def _part(num_tokens, TOKENS: tl.constexpr):
    """Tokens [first, last) of this program: equal parts of whole steps."""
    parts = tl.num_programs(0)
    size = tl.cdiv(tl.cdiv(num_tokens, TOKENS), parts) * TOKENS
    first = tl.minimum(tl.program_id(0) * size, num_tokens)
    return first, tl.minimum(first + size, num_tokens)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _count_digit(
    votes,
    candidate_ends,
    counts,
    top_k,
    n_init,
    votes_stride,
    BITS_0: tl.constexpr,
    BITS_1: tl.constexpr,
    TOKENS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    """Add this part's count of one digit to the row's."""
    row = tl.program_id(1).to(tl.int64)
    num_candidates = tl.load(candidate_ends + row) - n_init
    wanted = tl.load(top_k + row)
    if num_candidates > wanted:
        bins_0: tl.constexpr = 1 << BITS_0
        bins_1: tl.constexpr = 1 << BITS_1
        counts_line = counts + row * (bins_0 + bins_1)
        votes_line = votes + row * votes_stride
        first, last = _part(num_candidates, TOKENS)
        if DIGIT == 0:
            found = _histogram(votes_line, first, last, 0, BITS_1, BITS_0, TOKENS)
            # [bins_0]
            tl.atomic_add(counts_line + tl.arange(0, bins_0), found, found > 0)
        else:
            prefix = _counted_digit(counts_line, wanted, 0, 0, BITS_0)[0]
            found = _histogram(votes_line, first, last, prefix, 0, BITS_1, TOKENS)
            # [bins_1]
            tl.atomic_add(counts_line + bins_0 + tl.arange(0, bins_1), found, found > 0)


@triton.jit
def _threshold(counts, row, wanted, BITS_0: tl.constexpr, BITS_1: tl.constexpr):
    """Key of the lowest kept vote, and how many that equal it are kept."""
    bins_0: tl.constexpr = 1 << BITS_0
    bins_1: tl.constexpr = 1 << BITS_1
    line = counts + row * (bins_0 + bins_1)
    threshold, ties = _counted_digit(line, wanted, 0, 0, BITS_0)
    return _counted_digit(line, ties, threshold, bins_0, BITS_1)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _count_kept(
    votes,
    candidate_ends,
    counts,
    kept,
    top_k,
    n_init,
    votes_stride,
    BITS_0: tl.constexpr,
    BITS_1: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Count this part's votes above the threshold, and those that equal it."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_candidates = tl.load(candidate_ends + row) - n_init
    wanted = tl.load(top_k + row)
    if num_candidates > wanted:
        threshold = _threshold(counts, row, wanted, BITS_0, BITS_1)[0]
        first, last = _part(num_candidates, TOKENS)
        above = tl.zeros([TOKENS], tl.int32)
        equal = tl.zeros([TOKENS], tl.int32)
        for step in range(first, last, TOKENS):
            visible, key = _load_keys(votes + row * votes_stride, step, last, TOKENS)
            above += (visible & (key > threshold)).to(tl.int32)
            equal += (visible & (key == threshold)).to(tl.int32)
        tl.store(kept + row * 2 * MAX_PARTS + part, tl.sum(above, 0))
        tl.store(kept + (row * 2 + 1) * MAX_PARTS + part, tl.sum(equal, 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _write_parts(
    votes,
    block_table,
    row_seq,
    candidate_ends,
    context_ends,
    slots,
    lengths,
    counts,
    kept,
    top_k,
    n_init,
    votes_stride,
    table_stride,
    slots_stride,
    BLOCK_SIZE: tl.constexpr,
    BITS_0: tl.constexpr,
    BITS_1: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Write this part's kept candidates behind those of the parts before it.

    All parts together write what `reference.build_sparse_block_table` does.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = block_table + tl.load(row_seq + row).to(tl.int64) * table_stride
    slots_line = slots + row * slots_stride
    candidate_end = tl.load(candidate_ends + row)
    context_end = tl.load(context_ends + row)
    num_candidates = candidate_end - n_init
    wanted = tl.load(top_k + row)
    if num_candidates <= wanted:
        first, last = _part(context_end, TOKENS)
        write_range(line, first, last, first, slots_line, BLOCK_SIZE, TOKENS)
        if part == 0:
            tl.store(lengths + row, context_end)
    else:
        threshold, ties = _threshold(counts, row, wanted, BITS_0, BITS_1)
        other = tl.arange(0, MAX_PARTS)
        before = other < part
        # [MAX_PARTS]
        above = tl.sum(tl.load(kept + row * 2 * MAX_PARTS + other, before, 0), 0)
        equal = tl.sum(tl.load(kept + (row * 2 + 1) * MAX_PARTS + other, before, 0), 0)
        first, last = _part(num_candidates, TOKENS)
        _write_kept(
            votes + row * votes_stride,
            line,
            slots_line,
            first,
            last,
            n_init,
            threshold,
            tl.maximum(ties - equal, 0),
            n_init + above + tl.minimum(equal, ties),
            BLOCK_SIZE,
            TOKENS,
        )
        if part == 0:
            write_range(line, 0, n_init, 0, slots_line, BLOCK_SIZE, TOKENS)
            entry = n_init + wanted
            write_range(line, candidate_end, context_end, entry, slots_line, BLOCK_SIZE, TOKENS)
            tl.store(lengths + row, entry + context_end - candidate_end)
