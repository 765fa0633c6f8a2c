"""Shared memory, as one warp of a program accesses it: between two barriers, warps must not meet there.

What a warp has written no other may read or write before all have met at a barrier, and what it has read
no other may write. Several warps may write the same value, as Triton does where a layout repeats. So a
missing barrier is found in any order of the warps.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.emulator.lanes import TYPES
from tests.emulator.memory import Buffer, Fault, Memory

UNSET = 0xA5  # what it is full of at first


class SharedBytes:
    """The shared memory of a program, and which warps have accessed it since the last barrier.

    Attributes:
        writers, readers: a bit of each byte for each warp (modulo 8).
    """

    def __init__(self, size: int) -> None:
        size = max(-(-size // 16) * 16, 16)
        self.data = Buffer("shared memory", 0, np.full(size, UNSET, np.uint8))
        self.writers = Buffer("writers", 0, np.zeros(size, np.uint8))
        self.readers = Buffer("readers", 0, np.zeros(size, np.uint8))

    def pass_barrier(self) -> None:
        self.writers.data.fill(0)
        self.readers.data.fill(0)


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
        bits, own, others = _marks(dtype.itemsize, self._warp)
        writers = self._shared.writers.view(bits, count)[1][index]
        if np.bitwise_or.reduce(writers, axis=None) & others:
            raise Fault("reads what another warp wrote since the last barrier")
        readers = self._shared.readers.view(bits, count)[1]
        readers[index] |= own

    def _check_write(
        self, dtype: np.dtype, count: int, index: np.ndarray, value: np.ndarray
    ) -> None:
        bits, own, others = _marks(dtype.itemsize, self._warp)
        readers = self._shared.readers.view(bits, count)[1][index]
        if np.bitwise_or.reduce(readers, axis=None) & others:
            raise Fault("writes what another warp read since the last barrier")
        marks = self._shared.writers.view(bits, count)[1]
        writers = marks[index]
        if np.bitwise_or.reduce(writers, axis=None) & others:
            written = self._shared.data.view(dtype, count)[1][index]
            if ((writers & others != 0) & (written != value)).any():
                raise Fault("writes what another warp wrote since the last barrier")
        marks[index] = writers | own


@cache
def _marks(size: int, warp: int) -> tuple[np.dtype, np.unsignedinteger, np.unsignedinteger]:
    """Whole numbers of that many bytes; the warp's bit in each byte, and the bits of all others."""
    bits = TYPES[f"u{8 * size}"]
    own = int.from_bytes(bytes([1 << warp % 8] * size), "little")
    return bits, bits.type(own), bits.type(own ^ ((1 << 8 * size) - 1))
