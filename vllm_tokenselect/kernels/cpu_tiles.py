"""What the CPU kernels do with a tile of cached tokens: widen to fp32, dot products, weighted sum.

A tile is a 1-D fp32 scratch of `TILE_TOKENS` tokens, small enough for the first-level cache,
each token padded with zeros to a multiple of `LANES`. Every token takes the same arithmetic wherever it
lies in a tile, so a result depends neither on its neighbors nor on the alignment.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_tokenselect.kernels.cpu_vectors import (
    LANES,
    VECTOR,
    constant,
    fold,
    fused,
    repeat,
    shuffle,
    vector_pointer,
)

TILE_TOKENS = LANES  # `dot_tile` leaves one token's product in each lane
PREFETCH_TOKENS = 4 * TILE_TOKENS  # tokens lie anywhere: no processor foresees the next one


def _from_fp16(builder, half, floats):
    """Exactly the fp32 numbers of fp16 bits (zero-extended to 32).

    Integers throughout, as not every processor converts. The exponent's bias grows by 112, twice that
    for infinity and NaN. A subnormal gets a leading one, which is subtracted again: right too where the
    processor flushes subnormal fp32 numbers to zero.
    """
    bits = half.type

    def whole(number):
        return constant(bits, number)

    magnitude = builder.shl(builder.and_(half, whole(0x7FFF)), whole(13))
    finite = builder.icmp_unsigned("<", magnitude, whole(0x0F800000))
    bias = builder.select(finite, whole(112 << 23), whole(224 << 23))
    normal = builder.add(magnitude, bias)
    one = whole(113 << 23)
    subnormal = builder.fsub(
        builder.bitcast(builder.add(magnitude, one), floats), builder.bitcast(one, floats)
    )
    is_normal = builder.icmp_unsigned(">=", magnitude, whole(1 << 23))
    number = builder.select(is_normal, normal, builder.bitcast(subnormal, bits))
    sign = builder.shl(builder.and_(half, whole(0x8000)), whole(16))
    return builder.bitcast(builder.or_(number, sign), floats)


@intrinsic
def widen(typingctx, elements, first, count, tile, offset):
    """Write `count` cache elements from `first` on to `tile[offset:]` as fp32, exactly.

    `elements` holds fp32 numbers, bf16 bits as uint16 or fp16 bits as int16.
    """
    signature = types.void(elements, types.intp, types.intp, tile, types.intp)

    def codegen(context, builder, sig, args):
        elements, first, count, tile, offset = args
        i16, i32, f32 = ir.IntType(16), ir.IntType(32), ir.FloatType()

        def widen_at(index, vector):
            def shape(element):
                return ir.VectorType(element, LANES) if vector else element

            stored = f32 if sig.args[0].dtype == types.float32 else i16
            source = builder.add(first, index)
            pointer = vector_pointer(context, builder, sig.args[0], elements, source, shape(stored))
            number = builder.load(pointer, align=2 if stored is i16 else 4)
            if stored is i16:
                number = builder.zext(number, shape(i32))
                if sig.args[0].dtype == types.uint16:
                    sixteen = constant(shape(i32), 16)
                    number = builder.bitcast(builder.shl(number, sixteen), shape(f32))
                else:
                    number = _from_fp16(builder, number, shape(f32))
            target = builder.add(offset, index)
            pointer = vector_pointer(context, builder, sig.args[3], tile, target, shape(f32))
            builder.store(number, pointer, align=4)

        lanes = count.type(LANES)
        whole = builder.mul(builder.sdiv(count, lanes), lanes)
        with cgutils.for_range(builder, builder.sdiv(count, lanes)) as loop:
            widen_at(builder.mul(loop.index, lanes), vector=True)
        with cgutils.for_range(builder, builder.sub(count, whole)) as loop:
            widen_at(builder.add(whole, loop.index), vector=False)
        return context.get_dummy_value()

    return signature, codegen


@njit
def widen_listed(elements, starts, begin, count, shift, head_size, tile, stride):
    """Fill a tile with `count` tokens; `starts[begin:] + shift` say where they start."""
    for token in range(count):
        widen(elements, starts[begin + token] + shift, head_size, tile, token * stride)


@intrinsic
def dot_tile(typingctx, query, query_offset, tile, stride, scale, out, out_offset):
    """Write `scale` times the dot products of one query with all tokens of a tile, `TILE_TOKENS` numbers.

    LLVM would sum the lanes of one product at a time, which costs more than the product itself; here the
    products of a tile are folded into each other, lane by lane.
    """
    intp = types.intp
    signature = types.void(query, intp, tile, intp, types.float32, out, intp)

    def codegen(context, builder, sig, args):
        query, query_offset, tile, stride, scale, out, out_offset = args
        zero = constant(VECTOR, 0.0)

        def four_tokens(first):
            """Sixteen lanes: four partial sums of each of four tokens."""
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]
            with cgutils.for_range(builder, builder.sdiv(stride, stride.type(LANES))) as loop:
                lane = builder.mul(loop.index, stride.type(LANES))
                index = builder.add(query_offset, lane)
                pointer = vector_pointer(context, builder, sig.args[0], query, index)
                part = builder.load(pointer, align=4)
                for token, total in enumerate(sums, start=first):
                    index = builder.add(builder.mul(stride, stride.type(token)), lane)
                    pointer = vector_pointer(context, builder, sig.args[2], tile, index)
                    numbers = builder.load(pointer, align=4)
                    builder.store(fused(builder, part, numbers, builder.load(total)), total)
            a, b, c, d = (builder.load(total) for total in sums)
            return fold(builder, fold(builder, a, b, 8), fold(builder, c, d, 8), 4)

        a, b, c, d = (four_tokens(first) for first in range(0, TILE_TOKENS, 4))
        dots = fold(builder, fold(builder, a, b, 2), fold(builder, c, d, 2), 1)
        pointer = vector_pointer(context, builder, sig.args[5], out, out_offset)
        builder.store(builder.fmul(dots, repeat(builder, scale)), pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_tile(typingctx, target, target_offset, weights, weight_offset, tile, stride):
    """Add a tile's tokens, each times its own of `TILE_TOKENS` weights, to `stride` numbers of `target`."""
    intp = types.intp
    signature = types.void(target, intp, weights, intp, tile, intp)

    def codegen(context, builder, sig, args):
        target, target_offset, weights, weight_offset, tile, stride = args
        pointer = vector_pointer(context, builder, sig.args[2], weights, weight_offset)
        numbers = builder.load(pointer, align=4)
        factors = [shuffle(builder, numbers, numbers, [i] * LANES) for i in range(TILE_TOKENS)]
        with cgutils.for_range(builder, builder.sdiv(stride, stride.type(LANES))) as loop:
            lane = builder.mul(loop.index, stride.type(LANES))
            sums = []
            for token, factor in enumerate(factors):
                index = builder.add(builder.mul(stride, stride.type(token)), lane)
                pointer = vector_pointer(context, builder, sig.args[4], tile, index)
                numbers = builder.load(pointer, align=4)
                if token < 4:  # four chains of additions, which the processor can overlap
                    sums.append(builder.fmul(factor, numbers))
                else:
                    sums[token % 4] = fused(builder, factor, numbers, sums[token % 4])
            pairs = [builder.fadd(sums[i], sums[i + 2]) for i in range(2)]
            index = builder.add(target_offset, lane)
            pointer = vector_pointer(context, builder, sig.args[0], target, index)
            total = builder.fadd(*pairs)
            total = builder.fadd(builder.load(pointer, align=4), total)
            builder.store(total, pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def prefetch(typingctx, elements, index):
    """Ask for the cache line of `elements[index]`; any index inside the array."""
    signature = types.void(elements, types.intp)

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [pointer, i32(0), i32(2), i32(1)])  # read data, into the L2
        return context.get_dummy_value()

    return signature, codegen


@njit
def prefetch_run(elements, first, count):
    """Ask for the cache lines of `count` elements from `first` on."""
    for index in range(first, first + count, 64 // elements.itemsize):
        prefetch(elements, index)


@njit
def prefetch_listed(elements, starts, begin, shift, head_size):
    """Ask for the cache lines of the tile of tokens that start at `starts[begin:] + shift`."""
    for token in range(begin, min(begin + TILE_TOKENS, len(starts))):
        prefetch_run(elements, starts[token] + shift, head_size)
