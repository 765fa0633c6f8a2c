"""Sparse block table on a GPU: a radix selection over two digits of the votes, see `gpu_digits`.

Every program has a part of a row. It counts the exponents of its votes, which `soft_vote` may have done.
From all parts' counts follows the exponent of the `top_k`-th highest vote; of the votes that share it the
program counts the mantissas. From all parts' counts of those follows that vote itself, and how many
candidates the parts before a part keep: the program writes its own behind them. What is above the vote is
kept, and of what equals it the lowest positions.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.block_table import gpu_digits
from vllm_tokenselect.kernels.block_table.gpu_digits import (
    EXPONENTS,
    MANTISSA_BITS,
    MANTISSAS,
    PARTS_PER_STEP,
    count_above,
    count_exponents,
    find_digit,
    first_line,
    load_keys,
    sum_counts,
)
from vllm_tokenselect.kernels.block_table.gpu_write import write_row
from vllm_tokenselect.kernels.columns import Columns

RANGE_TOKENS = 1024  # of a sink or a local window that are written at once
# A kernel is compiled once, not again for every number that 16 happens to divide.
NUMBERS = ["n_init"]
ROW_ARRAYS = ["row_seq", "top_k", "candidate_ends", "context_ends", "columns"]


class TableScratch:
    """What the programs of a row tell each other, a line for each part: see `gpu_digits.first_line`.

    Args:
        columns: of all rows of a call, at most.
        rows: of a call, at most.
        device: where it lies.

    Attributes:
        exponents: int16 [lines, EXPONENTS], how often each occurs in a part.
        mantissas: int16 [lines, MANTISSAS], the same of those behind the threshold's exponent.
        found: int32 [lines, 3], the threshold's exponent, how many of those that share it are kept, and
            how many higher ones are in the row's parts before.
    """

    def __init__(self, columns: int, rows: int, device: torch.device) -> None:
        lines = gpu_digits.num_lines(columns, rows)
        self.exponents = torch.empty((lines, EXPONENTS), dtype=torch.int16, device=device)
        self.mantissas = torch.empty((lines, MANTISSAS), dtype=torch.int16, device=device)
        self.found = torch.empty((lines, 3), dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        return self.exponents.nbytes + self.mantissas.nbytes + self.found.nbytes


def num_launches(selects: bool, counted: bool) -> int:
    """Kernels that `build_sparse_block_table` launches."""
    return 1 + selects * (2 - counted)


def build_sparse_block_table(
    votes: torch.Tensor | None,
    columns: Columns,
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
    counted: bool = False,
) -> None:
    """As `reference.build_sparse_block_table`, for tensors on a GPU.

    A row with no more candidates than its `top_k` reads no votes. A row whose candidates and context
    end at 0, a padded one for example, gets a length of 0.

    Args:
        votes: fp32 [C], of all columns, from the one on that is numbered 0; None when no row has more
            candidates than its `top_k`.
        columns: of the rows, where there are votes.
        scratch: for all columns and rows; overwritten.
        counted: whether `soft_vote` has counted the exponents of these votes there.
    """
    if not len(slots):
        return
    launch = count_digits(
        votes, columns, slots, lengths, n_init, top_k, candidate_ends, scratch, counted
    )
    _write_table[launch.grid](
        **launch.rows,
        **launch.found,
        block_table=block_table,
        row_seq=row_seq,
        context_ends=context_ends,
        slots=slots,
        lengths=lengths,
        table_stride=block_table.stride(0),
        slots_stride=slots.stride(0),
        BLOCK_SIZE=block_size,
        RANGE=RANGE_TOKENS,
    )


@dataclass(frozen=True)
class PartLaunch:
    """Grid and arguments of kernels that work on the parts of rows.

    Attributes:
        grid: parts of a row, and rows.
        rows: the votes and where they end.
        found: what counting has found of them.
    """

    grid: tuple[int, int]
    rows: dict[str, Any]
    found: dict[str, Any]


def count_digits(
    votes: torch.Tensor | None,
    columns: Columns,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    n_init: int,
    top_k: torch.Tensor,
    candidate_ends: torch.Tensor,
    scratch: TableScratch,
    counted: bool,
) -> PartLaunch:
    """Launch what counts the votes' digits, and return what the kernel that writes the table takes.

    Args: as those of `build_sparse_block_table`.
    """
    selects = votes is not None
    width = columns.widest if selects else slots.shape[1]
    if votes is None:
        # Never read; of the kind that votes are, so that no other kernel is compiled.
        votes = lengths.view(torch.float32)
    grid = (gpu_digits.num_parts(width), len(slots))
    rows: dict[str, Any] = {
        "votes": votes,
        "candidate_ends": candidate_ends,
        "top_k": top_k,
        "columns": columns.starts,
        "n_init": n_init,
        "TOKENS": gpu_digits.PART_TOKENS,
        "MANTISSA_BITS": MANTISSA_BITS,
        "num_warps": 8,
    }
    found = {"mantissas": scratch.mantissas, "found": scratch.found, "PARTS": PARTS_PER_STEP}
    if selects:
        exponents: dict[str, Any] = {"exponents": scratch.exponents, "EXPONENTS": EXPONENTS}
        if not counted:
            _count_exponents[grid](**rows, **exponents)
        _count_mantissas[grid](**rows, **exponents, **found)
    return PartLaunch(grid, rows, found)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _count_exponents(
    votes,
    candidate_ends,
    top_k,
    columns,
    exponents,
    n_init,
    TOKENS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EXPONENTS: tl.constexpr,
):
    """Count the first digits of this part's votes."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_candidates = tl.load(candidate_ends + row) - n_init
    if (num_candidates > tl.load(top_k + row)) & (part * TOKENS < num_candidates):
        first_column = tl.multiple_of(tl.load(columns + row), 4)
        key, visible = load_keys(votes + first_column, num_candidates, TOKENS)
        counts = count_exponents(key, visible, EXPONENTS, MANTISSA_BITS)
        line = exponents + (first_line(first_column, row, TOKENS) + part) * EXPONENTS
        # [EXPONENTS]
        tl.store(line + tl.arange(0, EXPONENTS), counts)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _count_mantissas(
    votes,
    candidate_ends,
    top_k,
    columns,
    exponents,
    mantissas,
    found,
    n_init,
    TOKENS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EXPONENTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Find the threshold's exponent; count the second digits of this part's votes that share it."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_candidates = tl.load(candidate_ends + row) - n_init
    wanted = tl.load(top_k + row)
    if (num_candidates > wanted) & (part * TOKENS < num_candidates):
        bins: tl.constexpr = 1 << MANTISSA_BITS
        first_column = tl.multiple_of(tl.load(columns + row), 4)
        key, visible = load_keys(votes + first_column, num_candidates, TOKENS)
        first = first_line(first_column, row, TOKENS)
        parts = tl.cdiv(num_candidates, TOKENS)
        counts, before = sum_counts(exponents + first * EXPONENTS, parts, part, EXPONENTS, PARTS)
        exponent, sharing = find_digit(counts, wanted, EXPONENTS)
        shares = visible & (key >> MANTISSA_BITS == exponent)
        counts = tl.histogram(key & (bins - 1), bins, shares).to(tl.int16)
        # [bins]
        tl.store(mantissas + (first + part) * bins + tl.arange(0, bins), counts)
        own = found + (first + part) * 3
        tl.store(own, exponent)
        tl.store(own + 1, sharing)
        tl.store(own + 2, count_above(before, exponent, EXPONENTS))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS)
def _write_table(
    votes,
    block_table,
    row_seq,
    candidate_ends,
    context_ends,
    mantissas,
    found,
    slots,
    lengths,
    top_k,
    columns,
    n_init,
    table_stride,
    slots_stride,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    RANGE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """All programs of a row together write what `reference.build_sparse_block_table` does."""
    row = tl.program_id(1).to(tl.int64)
    write_row(
        votes,
        columns,
        block_table + tl.load(row_seq + row).to(tl.int64) * table_stride,
        tl.load(candidate_ends + row),
        tl.load(context_ends + row),
        tl.load(top_k + row),
        mantissas,
        found,
        slots + row * slots_stride,
        lengths,
        None,
        False,
        n_init,
        BLOCK_SIZE,
        TOKENS,
        RANGE,
        MANTISSA_BITS,
        PARTS,
    )
