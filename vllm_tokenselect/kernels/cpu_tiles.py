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


def widen(elements: np.ndarray, first: int, count: int, tile: np.ndarray, offset: int) -> None:
    """Write `count` cache elements from `first` on to `tile[offset:]` as fp32, exactly."""
    raise NotImplementedError("compiled code only")


@overload(widen, jit_options={"fastmath": FAST_MATH})
def _widen(elements, first, count, tile, offset):
    if elements.dtype == types.float32:

        def copy(elements, first, count, tile, offset):
            source, target = elements[first : first + count], tile[offset : offset + count]
            for i in range(count):
                target[i] = source[i]

        return copy

    if elements.dtype == types.uint16:

        def from_bf16(elements, first, count, tile, offset):
            source, target = elements[first : first + count], tile[offset : offset + count]
            for i in range(count):
                target[i] = np.uint32(np.uint32(source[i]) << np.uint32(16)).view(np.float32)

        return from_bf16

    def from_fp16(elements, first, count, tile, offset):
        # The exponent's bias grows by 112. A subnormal gets a leading one, which is subtracted again:
        # exact, and right too where the processor flushes subnormal fp32 numbers to zero.
        source, target = elements[first : first + count], tile[offset : offset + count]
        one = np.uint32(113 << 23).view(np.float32)
        for i in range(count):
            half = np.uint32(np.uint16(source[i]))
            magnitude = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
            bias = (
                np.uint32(112 << 23) if magnitude < np.uint32(0x0F800000) else np.uint32(224 << 23)
            )
            normal = np.uint32(magnitude + bias)
            subnormal = np.float32(
                np.uint32(magnitude + np.uint32(113 << 23)).view(np.float32) - one
            )
            bits = (
                normal if magnitude >= np.uint32(1 << 23) else np.float32(subnormal).view(np.uint32)
            )
            sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
            target[i] = np.uint32(bits | sign).view(np.float32)

    return from_fp16


@njit(fastmath=FAST_MATH)
def widen_tokens(elements, first, num_tokens, head_size, tile, stride):
    """Write `num_tokens` consecutive tokens of one KV head to a tile of `stride` numbers a token."""
    if stride == head_size:
        widen(elements, first, num_tokens * head_size, tile, 0)
    else:
        for token in range(num_tokens):
            widen(elements, first + token * head_size, head_size, tile, token * stride)


def _vector_pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [index])
    return builder.bitcast(pointer, ir.VectorType(ir.FloatType(), LANES).as_pointer())


def _shuffle(builder, a, b, lanes):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _fold(builder, a, b, width):
    """Add the halves of every group of `2 * width` lanes of a and of b; a's groups come first."""
    lower = [lane for lane in range(2 * LANES) if lane // width % 2 == 0]
    upper = [lane + width for lane in lower]
    return builder.fadd(
        _shuffle(builder, a, b, lower), _shuffle(builder, a, b, upper), flags=_CONTRACT
    )


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
        one = builder.insert_element(zero, scale, ir.IntType(32)(0))
        scales = _shuffle(builder, one, one, [0] * LANES)
        pointer = _vector_pointer(context, builder, sig.args[5], out, out_offset)
        builder.store(builder.fmul(dots, scales), pointer, align=4)
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
