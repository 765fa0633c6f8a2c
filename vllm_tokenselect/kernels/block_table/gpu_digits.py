"""Votes as two digits, and how often each occurs: what the kernels of a radix selection share.

Votes are not negative, so their first 16 bits order as they do: a sign of 0, eight bits of exponent and
seven of mantissa. The exponent is the first digit, the mantissa the second.

A row's candidates are cut into parts of `PART_TOKENS`, and every part has its own counts. So nothing is
added up in memory, and nothing has to be reset.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import INTERPRETED

# Candidates of a part, which one program works on at once; the interpreter takes as long for an absent one.
PART_TOKENS = 1024 if INTERPRETED else 4096
EXPONENTS, MANTISSA_BITS = 1 << 8, 7
MANTISSAS = 1 << MANTISSA_BITS
# Parts whose counts a program adds up at once.
PARTS_PER_STEP = 32


def num_parts(width: int) -> int:
    """Parts of a row of `width` candidates."""
    return int(triton.cdiv(width, PART_TOKENS))


def num_lines(columns: int, rows: int) -> int:
    """Lines that hold the counts of all parts of so many rows, which share so many columns."""
    return columns // PART_TOKENS + rows


@triton.jit
def first_line(first_column, row, TOKENS: tl.constexpr):
    """The line of the first part of a row that has the columns from `first_column` on.

    The rows before leave it free: each has one part more, at most, than its columns hold whole ones.
    """
    return first_column // TOKENS + row


@triton.jit
def order_keys(votes):
    """The first bits of votes, as integers of the same order; NaN (and -0) count as zero."""
    bits = votes.to(tl.int32, bitcast=True)
    return tl.where((bits > 0x7F800000) | (bits < 0), 0, bits >> 16)


@triton.jit
def load_keys(votes_line, num_candidates, TOKENS: tl.constexpr):
    """Order keys of this program's part of a row, and which of them are candidates.

    Args:
        votes_line: fp32, the row's votes; undefined from `num_candidates` on.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # Whole 16 bytes are loaded at once.
    loaded = token < tl.cdiv(num_candidates, 4) * 4
    # [TOKENS]
    return order_keys(tl.load(votes_line + token, loaded, 0.0)), token < num_candidates


@triton.jit
def count_exponents(key, visible, EXPONENTS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """How often each exponent occurs in a part, int16 [EXPONENTS]."""
    return tl.histogram(key >> MANTISSA_BITS, EXPONENTS, visible).to(tl.int16)


@triton.jit
def sum_counts(counts_line, parts, part, BINS: tl.constexpr, PARTS: tl.constexpr):
    """Counts of all parts of a row, and of those before `part`.

    Args:
        counts_line: int16 [parts, BINS].
        PARTS: added up at once.
    """
    digit = tl.arange(0, BINS)[None, :]
    total = tl.zeros([PARTS, BINS], tl.int32)
    before = tl.zeros([PARTS, BINS], tl.int32)
    for first in range(0, parts, PARTS):
        other = first + tl.arange(0, PARTS)[:, None]
        # [PARTS, BINS]
        found = tl.load(counts_line + other * BINS + digit, other < parts, 0).to(tl.int32)
        total += found
        before += tl.where(other < part, found, 0)
    return tl.sum(total, 0), tl.sum(before, 0)


@triton.jit
def find_digit(counts, wanted, BINS: tl.constexpr):
    """The threshold's digit, and how many of those that share it are wanted.

    `digit = max d with (sum over e >= d of counts[e]) >= wanted`.
    """
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    return digit, wanted - count_above(counts, digit, BINS)


@triton.jit
def count_above(counts, digit, BINS: tl.constexpr):
    """How many have a higher digit."""
    return tl.sum(tl.where(tl.arange(0, BINS) > digit, counts, 0), 0)
