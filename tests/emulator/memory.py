"""Memory that knows its buffers: an access out of bounds or not aligned is a fault."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.emulator.lanes import ALL, EVERY, NONE, NUM_LANES, Lanes


class Fault(Exception):
    """A kernel did what it must not do, or what is not modelled."""


class Buffer:
    """Bytes at an address.

    Args:
        name: what a fault calls it.
        address: of its first byte.
        data: uint8 [bytes], read and written in place.
    """

    def __init__(self, name: str, address: int, data: np.ndarray) -> None:
        self.name = name
        self.address = address
        self.data = data
        self._views: dict[tuple[str, int], tuple[np.uint64, np.ndarray]] = {}

    def view(self, dtype: np.dtype, count: int) -> tuple[np.uint64, np.ndarray]:
        """All aligned vectors of `count` elements, and the address of the first.

        Returns:
            address; vectors [n], or [n, count] if there is more than one element in each.
        """
        key = (dtype.char, count)
        if key not in self._views:
            size = dtype.itemsize * count
            start = min(-self.address % size, len(self.data))
            end = start + (len(self.data) - start) // size * size
            vectors = self.data[start:end].view(dtype)
            if count > 1:
                vectors = vectors.reshape(-1, count)
            self._views[key] = (np.uint64(self.address + start), vectors)
        return self._views[key]


class Memory:
    """A space of addresses. Lanes are active where a mask is true; the others access nothing."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = sorted(buffers, key=lambda buffer: buffer.address)
        self._starts = [buffer.address for buffer in self.buffers]

    def load(self, address: Lanes, mask: Lanes, dtype: np.dtype, count: int = 1) -> list[Lanes]:
        """Read `count` neighbors in every active lane; others get zeros.

        Args:
            address: uint64 [lanes].
            mask: bool [lanes].

        Returns:
            `count` arrays [lanes].

        Raises:
            Fault: an active lane is not aligned or out of bounds.
        """
        active = EVERY if mask is ALL else mask.tobytes()
        if active == EVERY:
            found = self._read(address, dtype, count)
            return [found] if count == 1 else [*found.T]
        out = np.zeros((count, NUM_LANES), dtype)
        if active != NONE:
            out[:, mask] = self._read(address[mask], dtype, count).T
        return [*out]

    def store(self, address: Lanes, mask: Lanes, dtype: np.dtype, values: Sequence[Lanes]) -> None:
        """Write neighbors in every active lane. Of lanes that share an address the last one wins."""
        active = EVERY if mask is ALL else mask.tobytes()
        if active == NONE:
            return
        columns = [value if np.ndim(value) else np.full(NUM_LANES, value) for value in values]
        if active != EVERY:
            address, columns = address[mask], [column[mask] for column in columns]
        value = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
        for lanes, vectors, index in self._places(address, dtype, len(columns)):
            own = value if lanes is None else value[lanes]
            self._check_write(dtype, len(columns), index, own)
            vectors[index] = own

    def atomic(
        self,
        operation: Callable[[Any, Any], Any],
        address: Lanes,
        mask: Lanes,
        dtype: np.dtype,
        value: Lanes,
    ) -> Lanes:
        """Replace what is at an address by `operation(old, value)`, one active lane after the other.

        Returns:
            old values [lanes]; zeros where no lane is active.
        """
        old = np.zeros(NUM_LANES, dtype)
        active = mask.nonzero()[0]
        if not len(active):
            return old
        value = np.broadcast_to(value, NUM_LANES)
        for lanes, vectors, index in self._places(address[active], dtype, 1):
            self._check_atomic(dtype, index)
            for lane, place in zip(active if lanes is None else active[lanes], index, strict=True):
                old[lane] = vectors[place]
                vectors[place] = operation(old[lane], value[lane])
        return old

    def _read(self, address: Lanes, dtype: np.dtype, count: int) -> np.ndarray:
        """Values [n] or [n, count] at addresses [n]."""
        out = np.empty((len(address), count) if count > 1 else len(address), dtype)
        for lanes, vectors, index in self._places(address, dtype, count):
            self._check_read(dtype, count, index)
            if lanes is None:
                return vectors[index]
            out[lanes] = vectors[index]
        return out

    def _places(
        self, address: Lanes, dtype: np.dtype, count: int
    ) -> Iterator[tuple[Lanes | None, np.ndarray, Lanes]]:
        """Where addresses lie: for each buffer the lanes (None: all), its vectors, and indices."""
        buffer = self._buffer_of(int(address[0]))
        index, vectors = _indices(buffer, address, dtype, count)
        if np.maximum.reduce(index) < len(vectors):
            yield None, vectors, index.view(np.int64)
            return
        numbers = np.array([bisect_right(self._starts, int(each)) for each in address])
        if (numbers == numbers[0]).all():
            raise _fault(buffer, address, dtype.itemsize * count)
        for number in np.unique(numbers):
            lanes = (numbers == number).nonzero()[0]
            for _, vectors, index in self._places(address[lanes], dtype, count):
                yield lanes, vectors, index

    def _buffer_of(self, address: int) -> Buffer:
        number = bisect_right(self._starts, address) - 1
        if number < 0:
            raise Fault(f"address {address:#x} is below all buffers")
        return self.buffers[number]

    def _check_read(self, dtype: np.dtype, count: int, index: np.ndarray) -> None:
        """Called before vectors are read."""

    def _check_write(
        self, dtype: np.dtype, count: int, index: np.ndarray, value: np.ndarray
    ) -> None:
        """Called before vectors are written."""

    def _check_atomic(self, dtype: np.dtype, index: np.ndarray) -> None:
        """Called before an atomic."""


def _indices(
    buffer: Buffer, address: Lanes, dtype: np.dtype, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of addresses among the buffer's vectors: uint64 [n], huge where there is none.

    The low bits of an offset, which are zero if it is aligned, become the high bits of the index, so that
    a single comparison finds both faults.
    """
    first, vectors = buffer.view(dtype, count)
    shift = (dtype.itemsize * count).bit_length() - 1
    offset = address - first
    return (offset >> shift) | (offset << (64 - shift)) if shift else offset, vectors


def _fault(buffer: Buffer, address: Lanes, size: int) -> Fault:
    offsets = [int(each) - buffer.address for each in address]
    outside = [offset for offset in offsets if not 0 <= offset <= len(buffer.data) - size]
    if outside:
        return Fault(
            f"{size} bytes out of bounds of {buffer.name} ({len(buffer.data)} bytes), "
            f"at offsets {outside[:4]}"
        )
    odd = [offset for offset in offsets if (offset + buffer.address) % size]
    return Fault(f"{size} bytes of {buffer.name} at offsets {odd[:4]} are not aligned")
