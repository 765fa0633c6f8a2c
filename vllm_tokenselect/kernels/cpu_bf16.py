"""Products of cached bf16 tokens on a CPU, without widening them first: they are read where they lie.

A product of two bf16 numbers is exact in fp32, so of a sum of products only the order is a choice. Where
the processor multiplies bf16 pairs (AVX512-BF16) one instruction adds 32 products; elsewhere the same pairs
are widened in registers. A tile is `TILE_TOKENS` tokens at any places; each takes the same arithmetic
wherever it lies in a tile, so a result depends on no neighbor.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from vllm_tokenselect.kernels.cpu_numbers import copy_run
from vllm_tokenselect.kernels.cpu_tiles import TILE_TOKENS
from vllm_tokenselect.kernels.cpu_vectors import (
    FP32,
    LANES,
    VECTOR,
    constant,
    fused,
    repeat,
    shuffle,
    vector_pointer,
)

BF16_LANES = 2 * LANES  # of one vector: `LANES` pairs
_PAIRS = ir.VectorType(ir.IntType(32), LANES)


class _BFloat(ir.Type):
    """LLVM's bf16, which llvmlite has no type for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def _has_bf16_products(context):
    """Whether the processor that the code is compiled for has AVX512-BF16; the kernels' cache knows it."""
    _, _, features = context.codegen().magic_tuple()
    return "+avx512bf16" in features.split(",")


def _widen_pairs(builder, pairs):
    """The even and the odd numbers of a vector, as fp32."""
    even = builder.shl(pairs, constant(_PAIRS, 16))
    odd = builder.and_(pairs, constant(_PAIRS, 0xFFFF0000))
    return builder.bitcast(even, VECTOR), builder.bitcast(odd, VECTOR)


def _add_products(context, builder, total, a, b):
    """`total` fp32 [LANES] and the products of two vectors of pairs, each pair's in a lane."""
    if _has_bf16_products(context):
        numbers = ir.VectorType(_BFloat(), BF16_LANES)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(VECTOR, [VECTOR, numbers, numbers]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        a, b = builder.bitcast(a, numbers), builder.bitcast(b, numbers)
        return builder.call(function, [total, a, b])
    (even, odd), (other_even, other_odd) = _widen_pairs(builder, a), _widen_pairs(builder, b)
    return fused(builder, even, other_even, fused(builder, odd, other_odd, total))


def _join(builder, a, b, width):
    """Add the halves of every group of `2 * width` lanes: a's in a group's lower half, b's in its upper."""
    is_lower = [lane // width % 2 == 0 for lane in range(LANES)]
    kept = [lane if low else lane + LANES for lane, low in enumerate(is_lower)]
    moved = [lane + width if low else lane + LANES - width for lane, low in enumerate(is_lower)]
    return builder.fadd(shuffle(builder, a, b, kept), shuffle(builder, a, b, moved))


def _joined(builder, sums, width=LANES // 2):
    """One vector of the sums of 16 vectors' lanes, in their order."""
    if len(sums) == 1:
        return sums[0]
    # What is joined first ends up farthest apart: neighbors come together last.
    half = len(sums) // 2
    pairs = zip(sums[:half], sums[half:], strict=True)
    return _joined(builder, [_join(builder, a, b, width) for a, b in pairs], width // 2)


@intrinsic
def dot_bf16_tile(typingctx, query, query_offset, places, num_vectors, scale, out, offset):
    """Write `scale` times the products of one query with a tile's tokens, `TILE_TOKENS` fp32 numbers.

    `places` are the addresses of the tokens' bf16 numbers (`place_tile`). The tokens and the query have
    `num_vectors * BF16_LANES` numbers each.
    """
    intp = types.intp
    signature = types.void(query, intp, places, intp, types.float32, out, intp)

    def codegen(context, builder, sig, args):
        query, query_offset, places, num_vectors, scale, out, offset = args
        at_once = 8 if _has_bf16_products(context) else 4  # as many as the registers hold
        part = vector_pointer(context, builder, sig.args[0], query, query_offset, _PAIRS)
        sums = []
        for first in range(0, TILE_TOKENS, at_once):
            tokens = [
                _token(context, builder, sig.args[2], places, first + token)
                for token in range(at_once)
            ]
            totals = [
                cgutils.alloca_once_value(builder, constant(VECTOR, 0.0)) for _ in range(at_once)
            ]
            with cgutils.for_range(builder, num_vectors) as loop:
                asking = builder.load(builder.gep(part, [loop.index]), align=2)
                for token, total in zip(tokens, totals, strict=True):
                    numbers = builder.load(builder.gep(token, [loop.index]), align=2)
                    added = _add_products(context, builder, builder.load(total), asking, numbers)
                    builder.store(added, total)
            sums += [builder.load(total) for total in totals]
        dots = builder.fmul(_joined(builder, sums), repeat(builder, scale))
        pointer = vector_pointer(context, builder, sig.args[5], out, offset)
        builder.store(dots, pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_bf16_tile(typingctx, sums, offset, weights, weight_offset, places, num_vectors):
    """Add a tile's tokens, each times its own of `TILE_TOKENS` fp32 weights, to fp32 sums.

    `places` as in `dot_bf16_tile`. Of each `BF16_LANES` sums the even ones come first (`in_order`).
    """
    intp = types.intp
    signature = types.void(sums, intp, weights, intp, places, intp)

    def codegen(context, builder, sig, args):
        sums, offset, weights, weight_offset, places, num_vectors = args
        tokens = [
            _token(context, builder, sig.args[4], places, token) for token in range(TILE_TOKENS)
        ]
        target = vector_pointer(context, builder, sig.args[0], sums, offset)
        own = vector_pointer(context, builder, sig.args[2], weights, weight_offset, FP32)
        with cgutils.for_range(builder, num_vectors) as loop:
            chains = [constant(VECTOR, 0.0)] * 4  # even and odd numbers of even and odd tokens
            for token, start in enumerate(tokens):
                pointer = builder.gep(own, [num_vectors.type(token)])
                weight = repeat(builder, builder.load(pointer, align=4))
                numbers = builder.load(builder.gep(start, [loop.index]), align=2)
                for half, part in enumerate(_widen_pairs(builder, numbers)):
                    chain = 2 * (token % 2) + half
                    if token < 2:
                        chains[chain] = builder.fmul(weight, part)
                    else:
                        chains[chain] = fused(builder, weight, part, chains[chain])
            for half in range(2):
                index = builder.add(
                    builder.mul(loop.index, num_vectors.type(2)), num_vectors.type(half)
                )
                pointer = builder.gep(target, [index])
                added = builder.fadd(chains[half], chains[half + 2])
                added = builder.fadd(builder.load(pointer, align=4), added)
                builder.store(added, pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _token(context, builder, array_type, places, token):
    """Pointer to the pairs of one token of a tile."""
    index = ir.IntType(64)(token)
    pointer = vector_pointer(context, builder, array_type, places, index, ir.IntType(64))
    return builder.inttoptr(builder.load(pointer, align=8), _PAIRS.as_pointer())


@intrinsic
def _address(typingctx, elements, index):
    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.gep(data, [args[1]]), ir.IntType(64))

    return types.int64(elements, types.intp), codegen


@njit
def padded_size(head_size):
    """The head size, up to a whole number of vectors."""
    return (head_size + BF16_LANES - 1) // BF16_LANES * BF16_LANES


@njit
def place_tile(elements, starts, begin, count, shift, head_size, tile, places):
    """Write the addresses of a tile's `count` tokens, which start at `starts[begin:] + shift`.

    They are read where they lie, if they fill the tile and its vectors. Else they are copied to `tile`
    [TILE_TOKENS, padded_size(head_size)], flat, with zeros around them. Addresses, as an array in a
    variable of a loop would count its references, and all threads would wait for that one counter.
    """
    stride = len(tile) // TILE_TOKENS
    if count == TILE_TOKENS and stride == head_size:
        for token in range(TILE_TOKENS):
            places[token] = _address(elements, starts[begin + token] + shift)
        return
    for token in range(count):
        copy_run(elements, starts[begin + token] + shift, tile, token * stride, head_size)
    for i in range(count * stride, len(tile)):
        tile[i] = 0
    for token in range(TILE_TOKENS):
        places[token] = _address(tile, token * stride)


def holds_bf16(elements):
    """Whether elements of a cache or of queries are the bits of bf16 numbers; compiled code only."""
    raise NotImplementedError


@overload(holds_bf16)
def _holds_bf16(elements):
    if elements.dtype == types.uint16:
        return lambda elements: True
    return lambda elements: False


@njit
def in_order(sums, first, out, target, count):
    """Write `count` sums of `add_bf16_tile` from `sums[first:]` to `out[target:]`, as the numbers lie."""
    for i in range(count):
        place = i // BF16_LANES * BF16_LANES + i % 2 * LANES + i % BF16_LANES // 2
        out[target + i] = sums[first + place]


@njit
def truncate(numbers, first, count, out, target):
    """Write the bits of fp32 numbers that are bf16 ones to `out[target:]`."""
    bits = numbers[first : first + count].view(np.uint32)
    for i in range(count):
        out[target + i] = np.uint16(bits[i] >> np.uint32(16))
