"""Shared memory, as one warp of a program accesses it: between two barriers, warps must not meet there.

What a warp has written no other may access before all have met at a barrier, and what it has read no other
may change. Several warps may write the same value, as Triton does where a layout repeats, and several may
change a place by atomics. So a missing barrier is found in any order of the warps.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.emulator.lanes import TYPES
from tests.emulator.memory import Buffer, Fault, Memory

UNSET = 0xA5  # what it is full of at first
READ, WROTE, CHANGED = "read", "wrote", "changed by an atomic"


class SharedBytes:
    """The shared memory of a program, and which warps have accessed it since the last barrier.

    Attributes:
        marks: for each kind of access, a bit of each byte for each warp (modulo 8).
    """

    def __init__(self, size: int) -> None:
        size = max(-(-size // 16) * 16, 16)
        self.data = Buffer("shared memory", 0, np.full(size, UNSET, np.uint8))
        self.marks = {
            kind: Buffer(kind, 0, np.zeros(size, np.uint8)) for kind in (READ, WROTE, CHANGED)
        }

    def pass_barrier(self) -> None:
        for marks in self.marks.values():
            marks.data.fill(0)


class SharedMemory(Memory):
    """A warp's view of a program's shared memory."""

    def __init__(self, shared: SharedBytes, warp: int) -> None:
        super().__init__([shared.data])
        self._shared = shared
        self._warp = warp

    def read_halves(self, index: np.ndarray) -> np.ndarray:
        """uint16 at indices, of any shape."""
        _, vectors = self._shared.data.view(TYPES["u16"], 1)
        self._check_read(TYPES["u16"], 1, index)
        return vectors[index]

    def _check_read(self, dtype: np.dtype, count: int, index: np.ndarray) -> None:
        for kind in (WROTE, CHANGED):
            if self._marks_of_others(kind, dtype, count, index) is not None:
                raise Fault(f"reads what another warp {kind} since the last barrier")
        self._mark(READ, dtype, count, index)

    def _check_write(
        self, dtype: np.dtype, count: int, index: np.ndarray, value: np.ndarray
    ) -> None:
        for kind in (READ, CHANGED):
            if self._marks_of_others(kind, dtype, count, index) is not None:
                raise Fault(f"writes what another warp {kind} since the last barrier")
        others = self._marks_of_others(WROTE, dtype, count, index)
        if others is not None:
            written = self._shared.data.view(dtype, count)[1][index]
            if ((others != 0) & (written != value)).any():
                raise Fault("writes what another warp wrote since the last barrier")
        self._mark(WROTE, dtype, count, index)

    def _check_atomic(self, dtype: np.dtype, index: np.ndarray) -> None:
        for kind in (READ, WROTE):
            if self._marks_of_others(kind, dtype, 1, index) is not None:
                raise Fault(f"changes what another warp {kind} since the last barrier")
        self._mark(CHANGED, dtype, 1, index)

    def _marks_of_others(
        self, kind: str, dtype: np.dtype, count: int, index: np.ndarray
    ) -> np.ndarray | None:
        """The bits of other warps at indices, None if there are none at all."""
        bits, _, others = _bits(dtype.itemsize, self._warp)
        marks = self._shared.marks[kind].view(bits, count)[1][index]
        return marks & others if np.bitwise_or.reduce(marks, axis=None) & others else None

    def _mark(self, kind: str, dtype: np.dtype, count: int, index: np.ndarray) -> None:
        bits, own, _ = _bits(dtype.itemsize, self._warp)
        self._shared.marks[kind].view(bits, count)[1][index] |= own


@cache
def _bits(size: int, warp: int) -> tuple[np.dtype, np.unsignedinteger, np.unsignedinteger]:
    """Whole numbers of that many bytes; the warp's bit in each byte, and the bits of all others."""
    bits = TYPES[f"u{8 * size}"]
    own = int.from_bytes(bytes([1 << warp % 8] * size), "little")
    return bits, bits.type(own), bits.type(own ^ ((1 << 8 * size) - 1))
