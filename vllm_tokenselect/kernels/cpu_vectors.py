"""Vectors in LLVM's own terms, and the few operations that every CPU kernel builds from them.

**No arithmetic here or in a kernel lets the compiler choose**: no fast math. numba compiles a function into
every kernel that calls it, each copy is optimized with its caller, and which copy runs depends on what was
compiled and what came from a cache. With fast math each copy adds up in an order of its own. So what is to
run in vectors is written in vectors, with the order of its sums, and what is to be one multiplication and
addition is one (`fused`).
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # fp32 numbers of one vector; LLVM splits it where the processor's are shorter
FP32 = ir.FloatType()
VECTOR = ir.VectorType(FP32, LANES)

_CHAINS = 4  # vectors in flight: a processor starts more additions than it has finished


def vector_pointer(context, builder, array_type, array, index, element=VECTOR):
    """Pointer to a vector of fp32 numbers from `array[index]` on, or to another `element` there."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), element.as_pointer())


def shuffle(builder, a, b, lanes):
    """The lanes of a (from 0 on) and b (from `LANES` on) that `lanes` names."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def repeat(builder, number):
    """A vector of one number."""
    empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, number, ir.IntType(32)(0))
    return shuffle(builder, one, one, [0] * LANES)


def fused(builder, a, b, c):
    """a * b + c, rounded once; numbers or vectors of them."""
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.{suffix}"
    )
    return builder.call(function, [a, b, c])


def fold(builder, a, b, width):
    """Add the halves of every group of `2 * width` lanes of a and of b; a's groups come first."""
    lower = [lane for lane in range(2 * LANES) if lane // width % 2 == 0]
    upper = [lane + width for lane in lower]
    return builder.fadd(shuffle(builder, a, b, lower), shuffle(builder, a, b, upper))


def constant(kind, number):
    """A number of a type, or a vector of it."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [number] * kind.count)
    return ir.Constant(kind, number)


def _greater(builder, a, b):
    """The greater of each pair; b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduce(builder, count, start, add_at, join):
    """Reduce `count` numbers to one, `_CHAINS` vectors at a time, then one, then number by number.

    Args:
        start: what no number at all gives.
        add_at: makes of (what was found, index, type) what is found with the numbers there.
        join: makes one of two.
    """
    intp = count.type
    chains = [cgutils.alloca_once_value(builder, constant(VECTOR, start)) for _ in range(_CHAINS)]
    found = cgutils.alloca_once_value(builder, constant(FP32, start))

    def add(chain, index, kind):
        builder.store(add_at(builder.load(chain), index, kind), chain)

    at_once = intp(_CHAINS * LANES)
    rest = builder.mul(builder.sdiv(count, at_once), at_once)
    with cgutils.for_range(builder, builder.sdiv(count, at_once)) as loop:
        first = builder.mul(loop.index, at_once)
        for number, chain in enumerate(chains):
            add(chain, builder.add(first, intp(number * LANES)), VECTOR)
    num_vectors = builder.sdiv(builder.sub(count, rest), intp(LANES))
    with cgutils.for_range(builder, num_vectors) as loop:
        add(chains[0], builder.add(rest, builder.mul(loop.index, intp(LANES))), VECTOR)
    rest = builder.add(rest, builder.mul(num_vectors, intp(LANES)))
    with cgutils.for_range(builder, builder.sub(count, rest)) as loop:
        add(found, builder.add(rest, loop.index), FP32)
    a, b, c, d = (builder.load(chain) for chain in chains)
    lanes = join(join(a, b), join(c, d))
    for width in (8, 4, 2, 1):
        lanes = join(lanes, shuffle(builder, lanes, lanes, [*range(width, LANES), *range(width)]))
    return join(builder.extract_element(lanes, ir.IntType(32)(0)), builder.load(found))


@intrinsic
def _largest(typingctx, numbers, count):
    def codegen(context, builder, sig, args):
        numbers, count = args

        def add_at(found, index, kind):
            pointer = vector_pointer(context, builder, sig.args[0], numbers, index, kind)
            return _greater(builder, builder.load(pointer, align=4), found)

        def join(a, b):
            return _greater(builder, a, b)

        return _reduce(builder, count, float("-inf"), add_at, join)

    return types.float32(numbers, types.intp), codegen


@njit
def largest(numbers):
    """The largest of contiguous fp32 numbers, leaving out NaN; `-inf` where there is none."""
    return _largest(numbers, len(numbers))


@intrinsic
def _dot(typingctx, a, b, first, count):
    def codegen(context, builder, sig, args):
        a, b, first, count = args

        def add_at(found, index, kind):
            index = builder.add(first, index)
            own = vector_pointer(context, builder, sig.args[0], a, index, kind)
            other = vector_pointer(context, builder, sig.args[1], b, index, kind)
            return fused(builder, builder.load(own, align=4), builder.load(other, align=4), found)

        return _reduce(builder, count, 0.0, add_at, builder.fadd)

    return types.float32(a, b, types.intp, types.intp), codegen


@njit
def dot(a, b, first, last):
    """The dot product of two contiguous fp32 arrays' elements [first, last)."""
    return _dot(a, b, first, last - first)


_LOG2_E = 1.4426950408889634
_ROUNDS = 1.5 * 2.0**23  # added to a small number, it leaves the nearest integer in the lowest bits
# 2 ** f for |f| <= 1/2: Taylor coefficients ln(2) ** n / n!, error below 2e-7.
_TAYLOR = (1.0, 0.6931471806, 0.2402265070, 0.0555041087, 0.0096181291, 0.0013333558, 0.0001540353)


def _exponential(builder, x):
    """exp(x) of numbers <= 0; 2 ** -126 for all that is less than that, NaN for NaN."""
    kind = x.type
    bits = ir.IntType(32)
    if isinstance(kind, ir.VectorType):
        bits = ir.VectorType(bits, kind.count)
    y = builder.fmul(x, constant(kind, _LOG2_E))
    least = constant(kind, -126.0)
    y = builder.select(builder.fcmp_ordered("<", y, least), least, y)
    rounded = builder.fadd(y, constant(kind, _ROUNDS))
    f = builder.fsub(y, builder.fsub(rounded, constant(kind, _ROUNDS)))
    series = constant(kind, _TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        series = fused(builder, series, f, constant(kind, coefficient))
    exponent = builder.shl(builder.bitcast(rounded, bits), constant(bits, 23))
    power = builder.add(exponent, constant(bits, 127 << 23))
    return builder.fmul(series, builder.bitcast(power, kind))


@intrinsic
def exponential(typingctx, x):
    """exp(x) of an fp32 number <= 0; at least 2 ** -126, and NaN for NaN."""

    def codegen(context, builder, sig, args):
        return _exponential(builder, args[0])

    return types.float32(types.float32), codegen


@intrinsic
def _exponentials(typingctx, numbers, count, highest):
    def codegen(context, builder, sig, args):
        numbers, count, highest = args
        vector = repeat(builder, highest)

        def add_at(found, index, kind):
            pointer = vector_pointer(context, builder, sig.args[0], numbers, index, kind)
            number = builder.load(pointer, align=4)
            less = builder.fsub(number, vector if kind is VECTOR else highest)
            number = _exponential(builder, less)
            builder.store(number, pointer, align=4)
            return builder.fadd(found, number)

        return _reduce(builder, count, 0.0, add_at, builder.fadd)

    return types.float32(numbers, types.intp, types.float32), codegen


@njit
def exponentials(numbers, highest):
    """Make exp(number - highest) of contiguous fp32 numbers, none higher; returns their sum."""
    return _exponentials(numbers, len(numbers), highest)


# tanh(z) / z for |z| < _SMALL, in powers of z * z, error below 5e-8; from there on by exponentials, which
# would cancel each other's digits near zero.
_SMALL = 0.3
_TANH = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)


def _hyperbolic_tangent(builder, z):
    kind = z.type
    magnitude = builder.select(
        builder.fcmp_ordered("<", z, constant(kind, 0.0)), builder.fneg(z), z
    )
    square = builder.fmul(z, z)
    series = constant(kind, _TANH[-1])
    for coefficient in reversed(_TANH[:-1]):
        series = fused(builder, series, square, constant(kind, coefficient))
    power = _exponential(builder, builder.fmul(magnitude, constant(kind, -2.0)))
    one = constant(kind, 1.0)
    large = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
    negative = builder.fcmp_ordered("<", z, constant(kind, 0.0))
    large = builder.select(negative, builder.fneg(large), large)
    small = builder.fcmp_ordered("<", magnitude, constant(kind, _SMALL))
    return builder.select(small, builder.fmul(z, series), large)


@intrinsic
def _cap_scores(typingctx, numbers, count, soft_cap):
    def codegen(context, builder, sig, args):
        numbers, count, soft_cap = args
        cap = repeat(builder, soft_cap)
        with cgutils.for_range(builder, builder.sdiv(count, count.type(LANES))) as loop:
            index = builder.mul(loop.index, count.type(LANES))
            pointer = vector_pointer(context, builder, sig.args[0], numbers, index)
            number = builder.load(pointer, align=4)
            capped = _hyperbolic_tangent(builder, builder.fdiv(number, cap))
            builder.store(builder.fmul(cap, capped), pointer, align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.float32), codegen


@njit
def cap_scores(numbers, soft_cap):
    """Make cap * tanh(number / cap) of contiguous fp32 numbers, a multiple of `LANES`, in place."""
    _cap_scores(numbers, len(numbers), soft_cap)
