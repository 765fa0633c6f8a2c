"""Matrices spread over the lanes of a warp.

In a tile of 8 x 8 halves, lane `4 * row + pair` holds the elements `2 * pair` and `2 * pair + 1` of a row.
Larger matrices are made of such tiles. Accumulators have a float where a tile has a half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from tests.emulator.lanes import ALL, LANES, TYPES, Lanes, widen_bf16
from tests.emulator.memory import Fault
from tests.emulator.shared import SharedMemory

Widen = Callable[[np.ndarray], np.ndarray]  # 16 bits to float32

_ROW = (LANES >> 2).astype(np.int64)
_COLUMN = (LANES & 3).astype(np.int64) * 2
# Of four registers of two halves: [4, lanes, 2]
_HALF = np.arange(2)
_A_ROW = np.stack([np.stack([_ROW + 8 * (i & 1)] * 2, 1) for i in range(4)])
_A_COLUMN = np.stack([_COLUMN[:, None] + _HALF + 8 * (i >> 1) for i in range(4)])
# Bytes of a line of shared memory, and which bits of its number turn it, by the mode of a descriptor.
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


def bf16(bits: np.ndarray) -> np.ndarray:
    return widen_bf16(bits)


def half(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def load_tiles(
    shared: SharedMemory, address: Lanes, count: int, transposed: bool = False
) -> list[Lanes]:
    """`ldmatrix`: lane 8 * i + row has the address of a row of tile i."""
    rows = shared.load(address, _addressing(count), TYPES["u64"], 2)
    tiles = np.stack(rows, axis=1).view(np.uint16).reshape(4, 8, 8)[:count]
    if transposed:
        tiles = tiles.transpose(0, 2, 1)
    # [count, lanes, 2]
    halves = np.ascontiguousarray(tiles[:, _ROW[:, None], _COLUMN[:, None] + _HALF])
    return [*halves.view(np.uint32)[..., 0]]


def store_tiles(
    shared: SharedMemory, address: Lanes, values: Sequence[Lanes], transposed: bool = False
) -> None:
    """`stmatrix`: lane 8 * i + row has the address of a row of tile i."""
    tiles = np.zeros((4, 8, 8), np.uint16)
    for tile, value in zip(tiles, values, strict=False):
        tile[_ROW[:, None], _COLUMN[:, None] + _HALF] = _halves(value)
    if transposed:
        tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1))
    rows = tiles.reshape(32, 8).view(np.uint64)
    shared.store(address, _addressing(len(values)), TYPES["u64"], [rows[:, 0], rows[:, 1]])


def multiply(widen: Widen, a: list[Lanes], b: list[Lanes], c: list[Lanes]) -> list[Lanes]:
    """`mma.m16n8k16`: c + a b, as float32."""
    right = np.zeros((16, 8), np.float32)
    for i, register in enumerate(b):
        right[_COLUMN[:, None] + _HALF + 8 * i, _ROW[:, None]] = widen(_halves(register))
    product = _left(widen, a) @ right
    row, column = _places(8)
    return [*(product[row, column] + np.stack(c))]


def multiply_shared(
    widen: Widen,
    shared: SharedMemory,
    old: list[Lanes],
    a: list[Lanes],
    descriptor: Lanes,
    adds: Lanes,
    *signs_and_orders: int,
) -> list[Lanes]:
    """`wgmma.m64nNk16`, of which a warp has 16 rows: old + a b, or a b; b lies in shared memory.

    Raises:
        Fault: a variant that is not modelled.
    """
    if len(a) != 4 or [int(each) for each in signs_and_orders] != [1, 1, 0]:
        raise Fault("wgmma with a in shared memory, negated, or b by rows is not modelled")
    columns = len(old) * 2
    index = _shared_matrix(int(descriptor[0]), columns)
    # [columns, 16]
    right = widen(shared.read_halves(index))
    row, column = _places(columns)
    product = (_left(widen, a) @ right.T)[row, column]
    return [*(product + np.stack(old) if np.all(adds) else product)]


def _addressing(count: int) -> Lanes:
    """The lanes whose addresses count."""
    return np.arange(32) < 8 * count if count < 4 else ALL


def _halves(register: Lanes) -> np.ndarray:
    """[lanes, 2]"""
    return np.ascontiguousarray(register).view(np.uint16).reshape(-1, 2)


def _left(widen: Widen, a: list[Lanes]) -> np.ndarray:
    """[16, 16]"""
    left = np.empty((16, 16), np.float32)
    left[_A_ROW, _A_COLUMN] = widen(np.stack(a).view(np.uint16).reshape(4, -1, 2))
    return left


@cache
def _places(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of an accumulator of 16 rows: [registers, lanes] each."""
    register = np.arange(columns // 2)[:, None]
    return _ROW + 8 * (register >> 1 & 1), register // 4 * 8 + _COLUMN + (register & 1)


@cache
def _shared_matrix(descriptor: int, columns: int) -> np.ndarray:
    """Where the halves of b lie in shared memory, in halves: [columns, 16]."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    if mode not in _SWIZZLES:
        raise Fault("wgmma of a matrix that is not swizzled is not modelled")
    pitch, turned = _SWIZZLES[mode]
    column = np.arange(columns)[:, None]
    address = start + column // 8 * stride + column % 8 * pitch + 2 * np.arange(16)
    return (address ^ (address >> 7 & turned) << 4) // 2
