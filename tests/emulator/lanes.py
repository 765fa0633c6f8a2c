"""What the 32 lanes of a warp compute, each as an array [32], as PTX defines it."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

NUM_LANES = 32
LANES = np.arange(NUM_LANES, dtype=np.uint32)
ALL = np.ones(NUM_LANES, bool)
# Predicates are compared as bytes, which is many times as fast as their reduction.
EVERY = ALL.tobytes()
NONE = bytes(NUM_LANES)

Lanes: TypeAlias = np.ndarray  # [32], or a number that all lanes share

# PTX's names of types, without their dots.
TYPES: dict[str, np.dtype] = {
    "u8": np.dtype(np.uint8),
    "u16": np.dtype(np.uint16),
    "u32": np.dtype(np.uint32),
    "u64": np.dtype(np.uint64),
    "s8": np.dtype(np.int8),
    "s16": np.dtype(np.int16),
    "s32": np.dtype(np.int32),
    "s64": np.dtype(np.int64),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(np.bool_),
}


def spread(value: Any, dtype: Any) -> Lanes:
    """The same number in every lane."""
    return np.full(NUM_LANES, value, dtype)


def divide(a: Lanes, b: Lanes) -> Lanes:
    """The quotient of whole numbers, rounded toward zero."""
    return (a - np.fmod(a, b)) // b


def fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """`a * b + c` of float32, rounded once: the product of two is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def saturated(a: Lanes, dtype: np.dtype) -> Lanes:
    """Whole float32 as whole numbers; NaN is zero, and what is too large becomes the largest."""
    limits = np.iinfo(dtype)
    whole = np.nan_to_num(a.astype(np.float64), nan=0.0)
    inside = (whole >= limits.min) & (whole < float(limits.max))
    largest = np.where(whole > 0, dtype.type(limits.max), dtype.type(limits.min))
    return np.where(inside, np.where(inside, whole, 0).astype(dtype), largest)


def leading_zeros(a: Lanes) -> Lanes:
    """Of 32 bits."""
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def count_bits(a: Lanes) -> Lanes:
    return np.bitwise_count(a).astype(np.uint32)


def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """`prmt`: four bytes out of the eight of `b, a`, or their sign, by the digits of the selector."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << 32)
    out = np.zeros(NUM_LANES, np.uint64)
    for place in range(4):
        digit = (selector.astype(np.uint64) >> 4 * place) & 15
        byte = (both >> (digit & 7) * 8) & 255
        byte = np.where(digit & 8, np.where(byte & 128, 255, 0).astype(np.uint64), byte)
        out |= byte << 8 * place
    return out.astype(np.uint32)


def pair(low: Lanes, high: Lanes) -> Lanes:
    """Two halves of 16 bits as 32 bits."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def widen_bf16(a: Lanes) -> Lanes:
    """bf16, as bits, to float32."""
    return (a.astype(np.uint32) << 16).view(np.float32)


def to_bf16(a: Lanes) -> Lanes:
    """float32 to bf16, as bits, rounded to the nearest, ties to even."""
    bits = a.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), rounded)


def from_fp8(a: Lanes, dtype: torch.dtype) -> Lanes:
    """The low byte of 16 bits as a float16, as bits."""
    values = torch.from_numpy(a.astype(np.uint8)).view(dtype).to(torch.float16)
    return values.numpy().view(np.uint16)


def ballot(a: Lanes) -> Lanes:
    """A bit for each lane that says yes."""
    return spread(np.packbits(a, bitorder="little").view(np.uint32)[0], np.uint32)


def _sources(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[Lanes, Lanes]:
    """Where `shfl` reads: lanes, and whether they are in range."""
    lane, b, c = LANES.astype(np.int64), b.astype(np.int64) & 31, c.astype(np.int64)
    segment, clamp = (c >> 8) & 31, c & 31
    first = lane & segment
    last = first | (clamp & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[
        mode
    ]
    inside = source >= last if mode == "up" else source <= last
    return np.where(inside, source, lane), inside


@cache
def _shared_sources(mode: str, b: int, c: int) -> tuple[Lanes, Lanes]:
    return _sources(mode, np.int64(b), np.int64(c))


def shuffle(mode: str, a: Lanes, b: Lanes, c: Lanes) -> tuple[Lanes, Lanes]:
    """What other lanes have, and whether they are in range (else a lane gets its own)."""
    if np.ndim(b) or np.ndim(c):
        source, inside = _sources(mode, b, c)
    else:
        source, inside = _shared_sources(mode, int(b), int(c))
    return a[source], inside
