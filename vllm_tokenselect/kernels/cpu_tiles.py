"""What the CPU kernels do with a tile of cached tokens: widen to fp32, dot products, weighted sum.

A tile is a 1-D fp32 scratch of `TILE_TOKENS` tokens, small enough for the first-level cache,
each token padded with zeros to a multiple of `LANES`. Every token takes the same arithmetic wherever it
lies in a tile, so a result depends neither on its neighbours nor on the alignment.

numba's cache follows only the file of the outermost kernel: after a change here, remove
`kernels/*/__pycache__/*.nb?`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# The OpenMP layer runs in PyTorch's own thread pool where vLLM preloads its libgomp. numba's other pools
# would put their threads on the one core that vLLM binds the worker's main thread to.
config.THREADING_LAYER = "omp"

LANES = 16  # fp32 numbers of one vector; LLVM splits it where the processor's are shorter
TILE_TOKENS = LANES  # `dot_tile` leaves one token's product in each lane

# Everything of "fast math" but the promise that there is no infinity and no NaN.
FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
_CONTRACT = ("contract", "reassoc", "nsz")


def _vector_pointer(context, builder, array_type, array, index, element=None):
    """Pointer to `LANES` numbers from `array[index]` on, or to one `element` there."""
    data = context.make_array(array_type)(context, builder, array).data
    target = ir.VectorType(ir.FloatType(), LANES) if element is None else element
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _shuffle(builder, a, b, lanes):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _repeat(builder, number):
    """A vector of one number."""
    empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, number, ir.IntType(32)(0))
    return _shuffle(builder, one, one, [0] * LANES)


def _fold(builder, a, b, width):
    """Add the halves of every group of `2 * width` lanes of a and of b; a's groups come first."""
    lower = [lane for lane in range(2 * LANES) if lane // width % 2 == 0]
    upper = [lane + width for lane in lower]
    return builder.fadd(
        _shuffle(builder, a, b, lower), _shuffle(builder, a, b, upper), flags=_CONTRACT
    )


def _from_fp16(builder, half, floats):
    """Exactly the fp32 numbers of fp16 bits (zero-extended to 32).

    Integers throughout, as not every processor converts. The exponent's bias grows by 112, twice that
    for infinity and NaN. A subnormal gets a leading one, which is subtracted again: right too where the
    processor flushes subnormal fp32 numbers to zero.
    """
    bits = half.type

    def constant(number):
        many = isinstance(bits, ir.VectorType)
        return ir.Constant(bits, [number] * LANES if many else number)

    magnitude = builder.shl(builder.and_(half, constant(0x7FFF)), constant(13))
    finite = builder.icmp_unsigned("<", magnitude, constant(0x0F800000))
    bias = builder.select(finite, constant(112 << 23), constant(224 << 23))
    normal = builder.add(magnitude, bias)
    one = constant(113 << 23)
    subnormal = builder.fsub(
        builder.bitcast(builder.add(magnitude, one), floats), builder.bitcast(one, floats)
    )
    is_normal = builder.icmp_unsigned(">=", magnitude, constant(1 << 23))
    number = builder.select(is_normal, normal, builder.bitcast(subnormal, bits))
    sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
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
            pointer = _vector_pointer(
                context, builder, sig.args[0], elements, source, shape(stored)
            )
            number = builder.load(pointer, align=2 if stored is i16 else 4)
            if stored is i16:
                number = builder.zext(number, shape(i32))
                if sig.args[0].dtype == types.uint16:
                    sixteen = ir.Constant(shape(i32), [16] * LANES if vector else 16)
                    number = builder.bitcast(builder.shl(number, sixteen), shape(f32))
                else:
                    number = _from_fp16(builder, number, shape(f32))
            target = builder.add(offset, index)
            pointer = _vector_pointer(context, builder, sig.args[3], tile, target, shape(f32))
            builder.store(number, pointer, align=4)

        lanes = count.type(LANES)
        whole = builder.mul(builder.sdiv(count, lanes), lanes)
        with cgutils.for_range(builder, builder.sdiv(count, lanes)) as loop:
            widen_at(builder.mul(loop.index, lanes), vector=True)
        with cgutils.for_range(builder, builder.sub(count, whole)) as loop:
            widen_at(builder.add(whole, loop.index), vector=False)
        return context.get_dummy_value()

    return signature, codegen


@njit(fastmath=FAST_MATH)
def widen_tokens(elements, first, num_tokens, head_size, tile, stride):
    """Write `num_tokens` consecutive tokens of one KV head to a tile of `stride` numbers a token."""
    if stride == head_size:
        widen(elements, first, num_tokens * head_size, tile, 0)
    else:
        for token in range(num_tokens):
            widen(elements, first + token * head_size, head_size, tile, token * stride)


@intrinsic
def dot_tile(typingctx, query, query_offset, tile, stride, scale, out, out_offset):
    """Write `scale` times the dot products of one query with all tokens of a tile, `TILE_TOKENS` numbers.

    Written as LLVM vectors because LLVM sums the lanes of one product at a time, which costs more than
    the product itself; here the products of a tile are folded into each other, lane by lane.
    """
    intp = types.intp
    signature = types.void(query, intp, tile, intp, types.float32, out, intp)

    def codegen(context, builder, sig, args):
        query, query_offset, tile, stride, scale, out, out_offset = args
        vector = ir.VectorType(ir.FloatType(), LANES)
        zero = ir.Constant(vector, [0.0] * LANES)

        def four_tokens(first):
            """Sixteen lanes: four partial sums of each of four tokens."""
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]
            with cgutils.for_range(builder, builder.sdiv(stride, stride.type(LANES))) as loop:
                lane = builder.mul(loop.index, stride.type(LANES))
                index = builder.add(query_offset, lane)
                pointer = _vector_pointer(context, builder, sig.args[0], query, index)
                part = builder.load(pointer, align=4)
                for token, total in enumerate(sums, start=first):
                    index = builder.add(builder.mul(stride, stride.type(token)), lane)
                    pointer = _vector_pointer(context, builder, sig.args[2], tile, index)
                    product = builder.fmul(part, builder.load(pointer, align=4), flags=_CONTRACT)
                    total_now = builder.fadd(builder.load(total), product, flags=_CONTRACT)
                    builder.store(total_now, total)
            a, b, c, d = (builder.load(total) for total in sums)
            return _fold(builder, _fold(builder, a, b, 8), _fold(builder, c, d, 8), 4)

        a, b, c, d = (four_tokens(first) for first in range(0, TILE_TOKENS, 4))
        dots = _fold(builder, _fold(builder, a, b, 2), _fold(builder, c, d, 2), 1)
        pointer = _vector_pointer(context, builder, sig.args[5], out, out_offset)
        builder.store(builder.fmul(dots, _repeat(builder, scale)), pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_tile(typingctx, target, target_offset, weights, weight_offset, tile, stride):
    """Add a tile's tokens, each times its own of `TILE_TOKENS` weights, to `stride` numbers of `target`."""
    intp = types.intp
    signature = types.void(target, intp, weights, intp, tile, intp)

    def codegen(context, builder, sig, args):
        target, target_offset, weights, weight_offset, tile, stride = args
        pointer = _vector_pointer(context, builder, sig.args[2], weights, weight_offset)
        numbers = builder.load(pointer, align=4)
        factors = [_shuffle(builder, numbers, numbers, [i] * LANES) for i in range(TILE_TOKENS)]
        with cgutils.for_range(builder, builder.sdiv(stride, stride.type(LANES))) as loop:
            lane = builder.mul(loop.index, stride.type(LANES))
            sums = []
            for token, factor in enumerate(factors):
                index = builder.add(builder.mul(stride, stride.type(token)), lane)
                pointer = _vector_pointer(context, builder, sig.args[4], tile, index)
                product = builder.fmul(factor, builder.load(pointer, align=4), flags=_CONTRACT)
                if token < 4:  # four chains of additions, which the processor can overlap
                    sums.append(product)
                else:
                    sums[token % 4] = builder.fadd(sums[token % 4], product, flags=_CONTRACT)
            pairs = [builder.fadd(sums[i], sums[i + 2], flags=_CONTRACT) for i in range(2)]
            index = builder.add(target_offset, lane)
            pointer = _vector_pointer(context, builder, sig.args[0], target, index)
            total = builder.fadd(*pairs, flags=_CONTRACT)
            total = builder.fadd(builder.load(pointer, align=4), total, flags=_CONTRACT)
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


@njit(fastmath=FAST_MATH)
def prefetch_run(elements, first, count):
    """Ask for the cache lines of `count` elements from `first` on."""
    for index in range(first, first + count, 64 // elements.itemsize):
        prefetch(elements, index)


def narrow(numbers, out, target):
    """Write fp32 numbers to `out[target:]`, rounded to nearest even; compiled code only.

    `out` holds fp32 numbers, bf16 bits as uint16 or fp16 bits as int16.
    """
    raise NotImplementedError


@overload(narrow)
def _narrow(numbers, out, target):
    if out.dtype == types.float32:
        return lambda numbers, out, target: copy_run(numbers, 0, out, target, len(numbers))
    to_bits = _bf16_bits if out.dtype == types.uint16 else _fp16_bits

    def narrow_bits(numbers, out, target):
        bits, narrowed = numbers.view(np.uint32), out[target : target + len(numbers)]
        for i in range(len(numbers)):
            narrowed[i] = to_bits(bits[i])

    return narrow_bits


@njit
def _bf16_bits(bits):
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


@njit
def _fp16_bits(bits):
    """As `_from_fp16` reads them. Too large a number becomes infinity."""
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))  # numba widens what it computes
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    rebased = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd)
    narrowed = np.uint32(rebased >> np.uint32(13))
    if magnitude < np.uint32(113 << 23):  # subnormal: a number of the smallest steps
        steps = magnitude.view(np.float32) * np.float32(1 << 24)
        narrowed = np.uint32(np.rint(steps))
    elif magnitude >= np.uint32(143 << 23):  # 65,536 and above
        narrowed = np.uint32(0x7E00 if magnitude > np.uint32(0x7F800000) else 0x7C00)
    return np.int16(narrowed | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@njit(fastmath=FAST_MATH)
def rotate_run(numbers, start, cos_sin, position):
    """Rotate `numbers[start:]` to a position, in place; `cos_sin` as in `Rotation`."""
    half = cos_sin.shape[1] // 2
    first, second = numbers[start : start + half], numbers[start + half : start + 2 * half]
    cosine, sine = cos_sin[position, :half], cos_sin[position, half:]
    for i in range(half):
        a, b = first[i], second[i]
        first[i] = a * cosine[i] - b * sine[i]
        second[i] = b * cosine[i] + a * sine[i]


@njit
def copy_run(elements, first, out, target, count):
    """Copy `count` elements from `first` on to `out[target:]`."""
    source, copied = elements[first : first + count], out[target : target + count]
    for i in range(count):
        copied[i] = source[i]


@njit(fastmath=FAST_MATH | {"nnan"})
def largest(numbers):
    """The largest of at least one fp32 number, none of them NaN."""
    found = numbers[0]
    for number in numbers:
        found = number if number > found else found
    return found


_LOG2_E = np.float32(1.4426950408889634)
# 2 ** f for |f| <= 1/2: Taylor coefficients ln(2) ** n / n!, error below 2e-7.
_C1, _C2, _C3 = np.float32(0.6931471806), np.float32(0.2402265070), np.float32(0.0555041087)
_C4, _C5, _C6 = np.float32(0.0096181291), np.float32(0.0013333558), np.float32(0.0001540353)


@njit(fastmath=FAST_MATH)
def exponential(x):
    """exp(x) of an fp32 number <= 0; a polynomial, because LLVM cannot vectorise the C library's."""
    y = x * _LOG2_E
    y = y if y > np.float32(-126) else np.float32(-126)
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    series = _C3 + f * (_C4 + f * (_C5 + f * _C6))
    series = np.float32(1) + f * (_C1 + f * (_C2 + f * series))
    return series * np.uint32(np.uint32(np.int32(whole) + 127) << np.uint32(23)).view(np.float32)
