"""How a program writes its part of a row of the sparse block table."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vllm_tokenselect.kernels.block_table.gpu_digits import (
    count_above,
    find_digit,
    first_line,
    load_keys,
    sum_counts,
)


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
def write_row(
    votes,
    columns,
    line,
    candidate_end,
    context_end,
    wanted,
    mantissas,
    found,
    slots_line,
    lengths,
    selected_line,
    remembers,
    n_init,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    RANGE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write this part's kept candidates behind those of the parts before it.

    The first part also writes the sink, what lies behind the candidates, and the length.

    Args:
        columns: where the votes of each row begin.
        line: of the row in the block table.
        selected_line: where the sink and the kept candidates are written too if the row `remembers` them.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_candidates = candidate_end - n_init
    if num_candidates <= wanted:
        for start in range(part * RANGE, context_end, tl.num_programs(0) * RANGE):
            last = tl.minimum(start + RANGE, context_end)
            write_range(line, start, last, start, slots_line, BLOCK_SIZE, RANGE)
        if part == 0:
            tl.store(lengths + row, context_end)
    elif part * TOKENS < num_candidates:
        first_column = tl.multiple_of(tl.load(columns + row), 4)
        key, visible = load_keys(votes + first_column, num_candidates, TOKENS)
        first = first_line(first_column, row, TOKENS)
        parts = tl.cdiv(num_candidates, TOKENS)
        kept, before = _place_kept(
            key, visible, mantissas, found, first, parts, MANTISSA_BITS, PARTS
        )
        position = n_init + part * TOKENS + tl.arange(0, TOKENS)
        # [TOKENS]
        block = tl.load(line + position // BLOCK_SIZE, kept, 0)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slots_line + n_init + before, slot, kept)
        if remembers:
            tl.store(selected_line + n_init + before, slot, kept)
        if part == 0:
            write_range(line, 0, n_init, 0, slots_line, BLOCK_SIZE, RANGE)
            if remembers:
                write_range(line, 0, n_init, 0, selected_line, BLOCK_SIZE, RANGE)
            entry = n_init + wanted
            write_range(line, candidate_end, context_end, entry, slots_line, BLOCK_SIZE, RANGE)
            tl.store(lengths + row, entry + context_end - candidate_end)


@triton.jit
def _place_kept(
    key, visible, mantissas, found, first, parts, MANTISSA_BITS: tl.constexpr, PARTS: tl.constexpr
):
    """Which candidates of this part the row keeps, and how many it keeps before each of them.

    Args:
        first: line of the row's first part.

    Returns:
        bool and int32 [TOKENS].
    """
    part = tl.program_id(0)
    bins: tl.constexpr = 1 << MANTISSA_BITS
    own = found + (first + part) * 3
    exponent, sharing, higher = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    counts, before = sum_counts(mantissas + first * bins, parts, part, bins, PARTS)
    mantissa, ties = find_digit(counts, sharing, bins)
    threshold = (exponent << MANTISSA_BITS) | mantissa
    is_above = visible & (key > threshold)
    is_equal = visible & (key == threshold)
    # Both are counted at once: a part has fewer than 2**15 candidates.
    order = tl.cumsum((is_equal.to(tl.int32) << 16) | is_above.to(tl.int32), 0)
    # [TOKENS]
    above = higher + count_above(before, mantissa, bins) + (order & 0xFFFF) - is_above.to(tl.int32)
    equal = tl.sum(tl.where(tl.arange(0, bins) == mantissa, before, 0), 0)
    equal += (order >> 16) - is_equal.to(tl.int32)
    return is_above | (is_equal & (equal < ties)), above + tl.minimum(equal, ties)
