"""Tiles move between lanes and shared memory, and products of matrices are those of NumPy."""

import numpy as np
import pytest
import torch

from tests.emulator.lanes import LANES
from tests.emulator.memory import Fault
from tests.emulator.snippets import run_snippet

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def whole_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Small whole numbers, of which all products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, columns), generator=generator).float()


def halves(matrix: torch.Tensor, dtype: str) -> np.ndarray:
    return matrix.to(DTYPES[dtype]).contiguous().view(torch.int16).numpy().view(np.uint16)


def tiles_of(matrix: np.ndarray) -> np.ndarray:
    """The registers of 8 x 8 tiles, tiles below each other first: uint32 [tiles, lanes]."""
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // 8, 8, columns // 8, 4, 2).transpose(2, 0, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(-1, 32, 2).view(np.uint32)[..., 0]


def spread_floats(matrix: np.ndarray) -> np.ndarray:
    """The registers of an accumulator of 16 rows: [registers, lanes]."""
    columns = matrix.shape[1]
    # [columns of tiles, rows of tiles, row, pair, 2]
    tiles = matrix.reshape(2, 8, columns // 8, 4, 2).transpose(2, 0, 4, 1, 3)
    return np.ascontiguousarray(tiles).reshape(-1, 32)


def load_registers(array: int, first: int, count: int) -> str:
    """Registers [count, lanes] of an array into %r{first} and on."""
    lines = [f"mul.wide.u32 %rd50, %r0, 4; add.s64 %rd50, %rd50, %rd{array};"]
    lines += [f"ld.global.b32 %r{first + i}, [%rd50+{128 * i}];" for i in range(count)]
    return "\n".join(lines)


def store_registers(array: int, first: int, count: int) -> str:
    return load_registers(array, first, 0) + "\n".join(
        f"st.global.b32 [%rd50+{128 * i}], %r{first + i};" for i in range(count)
    )


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


@pytest.mark.parametrize(
    ("instruction", "dtype"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "bf16"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "f16"),
    ],
)
def test_a_product_of_tiles_is_added(instruction: str, dtype: str):
    a, b, c = whole_matrix(16, 16, 0), whole_matrix(16, 8, 1), whole_matrix(16, 8, 2)
    sources = tiles_of(halves(a, dtype)), tiles_of(halves(b.T, dtype)), spread_floats(c.numpy())
    out = np.zeros_like(sources[2])
    lines = [
        *[load_registers(i, 10 * (i + 1), len(each)) for i, each in enumerate(sources)],
        f"{instruction} {registers(40, 4)}, {registers(10, 4)}, {registers(20, 2)}, {registers(30, 4)};",
        store_registers(3, 40, 4),
    ]
    run_snippet("\n".join(lines), *sources, out)
    np.testing.assert_array_equal(out, spread_floats((a @ b + c).numpy()))


# The mode of a descriptor, bytes of a line, and how often the lines repeat their turns.
SWIZZLES = [(1, 128, 8), (2, 64, 4), (3, 32, 2)]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize(("mode", "pitch", "turns"), SWIZZLES)
@pytest.mark.parametrize(
    ("instruction", "dtype"),
    [
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", "bf16"),
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16", "f16"),
    ],
)
def test_warps_multiply_by_a_matrix_in_shared_memory(
    instruction: str, dtype: str, mode: int, pitch: int, turns: int, columns: int, adds: bool
):
    a, b, c = whole_matrix(16, 16, 0), whole_matrix(columns, 16, 1), whole_matrix(16, columns, 2)
    shared = np.zeros((columns, pitch // 16, 8), np.uint16)
    for column, line in enumerate(halves(b, dtype).reshape(columns, 2, 8)):
        # A line of 128 bytes takes several columns if they are short.
        turn = column * pitch // 128 % turns
        for piece in range(2):
            shared[column, piece ^ turn] = line[piece]
    descriptor = 1024 >> 4 | (8 * pitch >> 4) << 32 | mode << 62
    sources = tiles_of(halves(a, dtype)), spread_floats(c.numpy())
    count = columns // 2
    out = np.zeros_like(sources[1])
    old, new = registers(60, count), instruction.replace("n16", f"n{columns}")
    lines = [
        load_registers(0, 10, 4),
        load_registers(1, 60, count),
        f"mov.b64 %rd30, {descriptor}; mov.b32 %r2, 0; shl.b32 %r3, %r0, 2;",
        "mul.wide.u32 %rd40, %r0, 4; add.s64 %rd40, %rd40, %rd2;",
        "$L_fill:",
        "ld.global.b32 %r4, [%rd40]; st.shared.b32 [%r3+1024], %r4; add.s32 %r2, %r2, 128;",
        "add.s32 %r3, %r3, 128; add.s64 %rd40, %rd40, 128;",
        f"setp.lt.u32 %p1, %r2, {shared.nbytes}; @%p1 bra $L_fill;",
        "fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;",
        f"setp.eq.u32 %p2, %r2, {shared.nbytes if adds else 0};",
        f"{new} {old}, {registers(10, 4)}, %rd30, %p2, 1, 1, 0;",
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        store_registers(3, 60, count),
    ]
    run_snippet("\n".join(lines), *sources, shared, out, shared_bytes=1024 + shared.nbytes)
    expected = a @ b.T + (c if adds else 0)
    np.testing.assert_array_equal(out, spread_floats(expected.numpy()))


def test_lanes_hold_pairs_of_a_row():
    tile = np.arange(64, dtype=np.uint16).reshape(8, 8)
    assert (tiles_of(tile)[0] & 0xFFFF).tolist() == [int(lane) * 2 for lane in LANES]


TILES = [
    ("stmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
    (
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    ),
]


@pytest.mark.parametrize(("store", "load"), TILES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_tiles_go_to_shared_memory_and_back(count: int, store: str, load: str):
    tiles = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    source = np.stack([tiles_of(tile)[0] for tile in tiles])
    stored, loaded = np.zeros((32, 8), np.uint16), np.zeros_like(source)
    lines = [
        load_registers(0, 10, count),
        "shl.b32 %r2, %r0, 4;",
        f"{store.replace('x4', f'x{count}')} [%r2], {registers(10, count)};",
        f"{load.replace('x4', f'x{count}')} {registers(20, count)}, [%r2];",
        store_registers(2, 20, count),
        "mul.wide.u32 %rd51, %r0, 16; add.s64 %rd51, %rd51, %rd1;",
        "ld.shared.v4.b32 {%r30, %r31, %r32, %r33}, [%r2];",
        "st.global.v4.b32 [%rd51], {%r30, %r31, %r32, %r33};",
    ]
    run_snippet("\n".join(lines), source, stored, loaded)
    np.testing.assert_array_equal(loaded, source)
    expected = tiles.transpose(0, 2, 1) if ".trans" in store else tiles
    np.testing.assert_array_equal(stored.reshape(4, 8, 8)[:count], expected)


def test_a_matrix_that_is_not_swizzled_is_not_modelled():
    lines = [
        "mov.b64 %rd30, 1;",
        load_registers(0, 10, 8),
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16",
        f"{registers(10, 8)}, {registers(10, 4)}, %rd30, 1, 1, 1, 0;",
    ]
    with pytest.raises(Fault, match="not swizzled"):
        run_snippet("\n".join(lines), np.zeros((8, 32), np.uint32))
