"""Numbers of one token on a CPU: rounded to the cache's dtype, rotated, copied."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload


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


@njit
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
