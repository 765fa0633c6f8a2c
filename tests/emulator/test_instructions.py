"""Every row of the table computes what PTX says."""

import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.instructions import TABLE, Row, find
from tests.emulator.memory import Fault
from tests.emulator.snippets import compute

NAN, INF = float("nan"), float("inf")
LANE = np.arange(32)
LARGEST, LOWEST = (1 << 31) - 1, 1 << 31  # of s32, as bits


def signed(*values: int, bits: int = 32) -> list[int]:
    return [value % (1 << bits) for value in values]


# An instruction, what it reads, and what it writes: whole numbers as bits, floats as float32.
WHOLE_NUMBERS = [
    ("mov.b32 %r100, %r1", [[7, 8]], [7, 8]),
    ("mov.u32 %r100, 0x10", [], [16]),
    ("mov.b32 %r100, 0f3F800000", [], [1.0]),
    ("mov.b32 %r100, {%rs1, %rs2}", [[1], [2]], [0x20001]),
    ("mov.b64 %rd100, {%r1, %r2}", [[1], [2]], [0x2_0000_0001]),
    ("mov.b32 {_, %rs100}, %r1", [[0x50004]], [5]),
    ("mov.pred %p100, %p1", [[1, 0]], [True, False]),
    ("mov.pred %p100, -1", [], [True]),
    ("selp.b32 %r100, %r1, 9, %p1", [[3], [1, 0]], [3, 9]),
    ("selp.f32 %r100, %r1, 0fFF800000, %p1", [[3.0], [1, 0]], [3.0, -INF]),
    ("selp.b16 %rs100, -1, 0, %p1", [[1, 0]], [0xFFFF, 0]),
    ("add.s32 %r100, %r1, %r2", [[0xFFFFFFFF, 5], [1, 7]], [0, 12]),
    ("add.s64 %rd100, %rd1, -8", [[24]], [16]),
    ("sub.s32 %r100, 3, %r1", [[5]], signed(-2)),
    ("sub.s16 %rs100, %rs1, %rs2", [[0], [1]], [0xFFFF]),
    ("mul.lo.s32 %r100, %r1, %r2", [[1 << 31], [6]], [0]),
    ("mad.lo.s32 %r100, %r1, %r2, %r3", [[7], [6], [5]], [47]),
    ("mul.wide.s32 %rd100, %r1, 4", [signed(-3)], signed(-12, bits=64)),
    ("mul.wide.s32 %rd100, %r1, -4", [[3]], signed(-12, bits=64)),
    ("mul.wide.u32 %rd100, %r1, %r2", [signed(-1), signed(-1)], [0xFFFFFFFE00000001]),
    ("mad.wide.s32 %rd100, %r1, 2, %rd1", [signed(-3), [10]], [4]),
    ("mul.hi.s32 %r100, %r1, %r2", [signed(-1, LARGEST), [5, 4]], signed(-1, 1)),
    ("mul.hi.u16 %rs100, %rs1, 9363", [[21]], [3]),
    ("div.s32 %r100, %r1, %r2", [signed(-7, 7, 6), signed(2, -2, -3)], signed(-3, -3, -2)),
    ("div.u32 %r100, %r1, 10", [signed(-7)], [429496728]),
    ("rem.s32 %r100, %r1, %r2", [signed(-7, 7), signed(2, -2)], signed(-1, 1)),
    ("rem.u32 %r100, %r1, 10", [[17]], [7]),
    ("neg.s32 %r100, %r1", [[5]], signed(-5)),
    ("abs.s32 %r100, %r1", [signed(-5, 5)], [5]),
    ("min.s32 %r100, %r1, 3", [signed(-1, 5)], signed(-1, 3)),
    ("min.u32 %r100, %r1, 3", [signed(-1, 2)], [3, 2]),
    ("max.s32 %r100, %r1, 3", [signed(-1, 5)], [3, 5]),
    ("max.relu.s32 %r100, %r1, -3", [signed(-1, 5)], [0, 5]),
    ("and.b32 %r100, %r1, -16", [[0x1F]], [0x10]),
    ("and.pred %p100, %p1, %p2", [[1, 1, 0], [1, 0, 1]], [True, False, False]),
    ("or.b32 %r100, %r1, 3", [[4]], [7]),
    ("or.pred %p100, %p1, %p2", [[1, 0], [0, 0]], [True, False]),
    ("xor.b32 %r100, %r1, %r2", [[6], [3]], [5]),
    ("xor.pred %p100, %p1, -1", [[1, 0]], [False, True]),
    ("not.b32 %r100, %r1", [[0]], [0xFFFFFFFF]),
    ("not.pred %p100, %p1", [[1, 0]], [False, True]),
    ("shl.b32 %r100, %r1, %r2", [[3], [0, 31, 32, 40]], [3, 1 << 31, 0, 0]),
    ("shl.b64 %rd100, %rd1, 2", [[1 << 62]], [0]),
    ("shl.b16 %rs100, %rs1, 3", [[0xFFFF]], [0xFFF8]),
    ("shr.u32 %r100, %r1, %r2", [[LOWEST], [31, 32]], [1, 0]),
    ("shr.s32 %r100, %r1, %r2", [signed(-8), [1, 32]], signed(-4, -1)),
    ("shr.s64 %rd100, %rd1, 1", [signed(-8, bits=64)], signed(-4, bits=64)),
    ("bfe.u32 %r100, %r1, 4, 8", [[0x12345]], [0x34]),
    ("bfe.s32 %r100, %r1, 3, 1", [[8, 4]], signed(-1, 0)),
    ("popc.b32 %r100, %r1", [[0xF0F1, 0]], [9, 0]),
    ("clz.b32 %r100, %r1", [[1, 0, LOWEST]], [31, 32, 0]),
    ("prmt.b32 %r100, %r1, %r2, 0x7250U", [[0x33221100], [0x77665544]], [0x77225500]),
    ("prmt.b32 %r100, %r1, 0, 0x8881U", [[0x80FF]], [0xFFFFFF80]),
]
FLOATS = [
    ("add.f32 %r100, %r1, %r2", [[1.5], [2.25]], [3.75]),
    ("add.rn.ftz.f32 %r100, %r1, 0f3F800000", [[1.5]], [2.5]),
    ("sub.f32 %r100, %r1, %r2", [[1.5, INF], [2.25, INF]], [-0.75, NAN]),
    ("mul.f32 %r100, %r1, 0f40000000", [[1.5, 3e38]], [3.0, INF]),
    # The product of both is rounded to 1 on its own.
    ("fma.rn.f32 %r100, %r1, %r2, 0fBF800000", [[1 + 2**-13], [1 - 2**-13]], [-(2.0**-26)]),
    ("div.full.f32 %r100, %r1, %r2", [[1.0, 1.0], [4.0, 0.0]], [0.25, INF]),
    ("rcp.approx.ftz.f32 %r100, %r1", [[4.0]], [0.25]),
    ("sqrt.approx.ftz.f32 %r100, %r1", [[9.0, -1.0]], [3.0, NAN]),
    ("rsqrt.approx.f32 %r100, %r1", [[4.0]], [0.5]),
    ("ex2.approx.f32 %r100, %r1", [[3.0, -INF]], [8.0, 0.0]),
    ("lg2.approx.f32 %r100, %r1", [[8.0, 0.0]], [3.0, -INF]),
    ("tanh.approx.f32 %r100, %r1", [[0.5, INF]], [0.46211717, 1.0]),
    ("neg.f32 %r100, %r1", [[1.0]], [-1.0]),
    ("abs.f32 %r100, %r1", [[-1.0]], [1.0]),
    ("copysign.f32 %r100, %r1, %r2", [[-1.0, 1.0], [3.0, -3.0]], [-3.0, 3.0]),
    ("min.f32 %r100, %r1, %r2", [[1.0, NAN], [2.0, 2.0]], [1.0, 2.0]),
    ("max.f32 %r100, %r1, %r2", [[1.0, NAN], [2.0, 2.0]], [2.0, 2.0]),
    ("min.NaN.f32 %r100, %r1, %r2", [[1.0, NAN], [2.0, 2.0]], [1.0, NAN]),
    ("max.NaN.f32 %r100, %r1, %r2", [[1.0, NAN], [2.0, 2.0]], [2.0, NAN]),
]
COMPARISONS = [
    ("setp.eq.b16 %p100, %rs1, 1", [[1, 2]], [True, False]),
    ("setp.ne.b32 %p100, %r1, 1", [[1, 2]], [False, True]),
    ("setp.lt.s32 %p100, %r1, 0", [signed(-1, 0)], [True, False]),
    ("setp.lt.u32 %p100, %r1, 1", [signed(-1, 0)], [False, True]),
    ("setp.le.s32 %p100, %r1, 0", [signed(-1, 0, 1)], [True, True, False]),
    ("setp.gt.u32 %p100, %r1, 1", [signed(-1, 1)], [True, False]),
    ("setp.ge.s64 %p100, %rd1, 0", [signed(-1, 0, bits=64)], [False, True]),
    *[
        (f"{name} %p100, %r1, %r2", [[1.0, 2.0, 3.0, NAN], [2.0]], expected)
        for name, expected in {
            "setp.eq.f32": [False, True, False, False],
            "setp.ne.f32": [True, False, True, False],
            "setp.lt.f32": [True, False, False, False],
            "setp.le.f32": [True, True, False, False],
            "setp.gt.f32": [False, False, True, False],
            "setp.ge.f32": [False, True, True, False],
            "setp.equ.f32": [False, True, False, True],
            "setp.neu.f32": [True, False, True, True],
            "setp.ltu.f32": [True, False, False, True],
            "setp.leu.f32": [True, True, False, True],
            "setp.gtu.f32": [False, False, True, True],
            "setp.geu.f32": [False, True, True, True],
            "setp.num.f32": [True, True, True, False],
            "setp.nan.f32": [False, False, False, True],
        }.items()
    ],
]
CONVERSIONS = [
    ("cvt.s64.s32 %rd100, %r1", [signed(-2)], signed(-2, bits=64)),
    ("cvt.u64.u32 %rd100, %r1", [signed(-2)], [0xFFFFFFFE]),
    ("cvt.u32.u64 %r100, %rd1", [[0x1_0000_0005]], [5]),
    ("cvt.u16.u32 %rs100, %r1", [[0x10005]], [5]),
    ("cvt.s32.s8 %r100, %r1", [[0x1FE]], signed(-2)),
    ("cvt.rn.f32.s32 %r100, %r1", [signed(-3, (1 << 24) + 1)], [-3.0, 16777216.0]),
    ("cvt.rn.f32.u32 %r100, %r1", [signed(-1)], [4294967296.0]),
    ("cvt.rzi.s32.f32 %r100, %r1", [[-1.7, 3e9, -INF, NAN]], [*signed(-1), LARGEST, LOWEST, 0]),
    ("cvt.rni.s32.f32 %r100, %r1", [[2.5, 3.5]], [2, 4]),
    ("cvt.rmi.s32.f32 %r100, %r1", [[-1.5]], signed(-2)),
    ("cvt.rpi.s32.f32 %r100, %r1", [[1.5]], [2]),
    ("cvt.rzi.f32.f32 %r100, %r1", [[-1.5]], [-1.0]),
    ("cvt.rni.f32.f32 %r100, %r1", [[2.5]], [2.0]),
    ("cvt.rmi.f32.f32 %r100, %r1", [[-1.5]], [-2.0]),
    ("cvt.rpi.f32.f32 %r100, %r1", [[1.5]], [2.0]),
    ("cvt.f32.f16 %r100, %rs1", [[0x3E00]], [1.5]),
    ("cvt.rn.f16.f32 %rs100, %r1", [[1.5, 1e6]], [0x3E00, 0x7C00]),
    ("cvt.f32.bf16 %r100, %rs1", [[0x3FC0]], [1.5]),
    # Ties go to the even one.
    ("cvt.rn.bf16.f32 %rs100, %r1", [[1.5, 1 + 2**-8, 1 + 3 * 2**-8]], [0x3FC0, 0x3F80, 0x3F82]),
    ("cvt.bf16.f16 %rs100, %rs1", [[0x3E00]], [0x3FC0]),
    ("cvt.rn.bf16x2.f32 %r100, %r1, %r2", [[1.5], [-2.0]], [0x3FC0C000]),
    ("cvt.rn.f16x2.f32 %r100, %r1, %r2", [[1.5], [-2.0]], [0x3E00C000]),
    ("cvt.rn.f16x2.e4m3x2 %r100, %rs1", [[0x387E]], [0x3C005F00]),
    ("cvt.rn.f16x2.e5m2x2 %r100, %rs1", [[0x3C40]], [0x3C004000]),
]
BETWEEN_LANES = [
    (
        "shfl.sync.up.b32 %r100|%p100, %r1, 1, 0, -1",
        [LANE],
        ([0, *range(31)], [False] + [True] * 31),
    ),
    (
        "shfl.sync.down.b32 %r100|%p100, %r1, 2, 31, -1",
        [LANE],
        ([*range(2, 32), 30, 31], [True] * 30 + [False] * 2),
    ),
    ("shfl.sync.bfly.b32 %r100, %r1, 16, 31, -1", [LANE], LANE ^ 16),
    ("shfl.sync.bfly.b32 %r100, %r1, 1, 0x1c1f, -1", [LANE], LANE ^ 1),
    ("shfl.sync.idx.b32 %r100, %r1, %r2, 31, -1", [LANE + 5, LANE // 2], LANE // 2 + 5),
    ("redux.sync.add.s32 %r100, %r1, -1", [LANE], [496]),
    ("redux.sync.min.s32 %r100, %r1, -1", [signed(*range(-5, 27))], signed(-5)),
    ("redux.sync.max.s32 %r100, %r1, -1", [signed(*range(-40, -8))], signed(-9)),
    ("vote.sync.ballot.b32 %r100, %p1, -1", [[1, 0]], [0x55555555]),
    ("vote.sync.any.pred %p100, %p1, -1", [[1, 0]], [True]),
    ("vote.sync.all.pred %p100, %p1, -1", [[1, 0]], [False]),
    ("elect.sync _|%p100, -1", [], [True] + [False] * 31),
    ("bar.warp.sync -1; mov.b32 %r100, %r1", [[3]], [3]),
]


def assert_computes(instruction: str, sources: list, expected) -> None:
    results = compute(instruction, *sources)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, values in zip(results, expected, strict=True):
        values = np.resize(np.array(values), 32)
        if values.dtype.kind == "f":
            np.testing.assert_allclose(result.view(np.float32), values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(result, values.astype(result.dtype))


@pytest.mark.parametrize(
    ("instruction", "sources", "expected"),
    WHOLE_NUMBERS + FLOATS + COMPARISONS + CONVERSIONS + BETWEEN_LANES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_instruction_computes_what_ptx_says(instruction, sources, expected):
    assert_computes(instruction, sources, expected)


def test_a_guard_keeps_what_was_there_in_other_lanes():
    body = "mov.b32 %r100, %r1; @%p1 add.s32 %r100, %r1, 1; @!%p1 add.s32 %r100, %r100, 10"
    assert_computes(body, [[5], [1, 0]], [6, 15])


def test_a_scope_has_registers_of_its_own():
    body = "{ .reg .b32 a; .reg .f16 a<2>; mov.b32 a, %r1; mov.b32 {a0, a1}, a;"
    body += " mov.b32 %r100, {a1, a0}; } mov.b32 %r101, %r1"
    assert_computes(body, [[0x20001]], ([0x10002], [0x20001]))


@pytest.mark.parametrize("text", ["bfi.b32 %r100, %r1, %r1, 0, 8", "mul.hi.u64 %rd100, %rd1, 3"])
def test_what_is_not_modelled_is_a_fault_with_its_opcode(text: str):
    with pytest.raises(Fault, match=text.split()[0]):
        compute(text, [1])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
def test_every_row_of_the_table_is_in_a_test(row):
    assert row in rows_of_the_tests()


@cache
def rows_of_the_tests() -> list[Row]:
    folder = Path(__file__).parent
    files = [*folder.glob("test_*.py"), folder / "snippets.py"]
    text = "".join(path.read_text() for path in files)
    rows = []
    for opcode in set(re.findall(r"\b[a-z]\w*\.[\w.:]+\w", text)):
        with suppress(Fault):
            rows.append(find(opcode).row)
    return rows
