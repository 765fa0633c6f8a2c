"""Loads, stores and atomics reach what they should, and nothing else."""

import numpy as np
import pytest

from tests.emulator.memory import Fault
from tests.emulator.snippets import run_snippet

ADDRESS = "mul.wide.u32 %rd10, %r0, {size}; add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;"


def body(size: int, *lines: str) -> str:
    """Instructions that find `size` bytes for each thread at %rd11 in array 0, %rd12 in array 1."""
    return "\n".join([ADDRESS.format(size=size), *lines])


def arrays(count: int = 32, dtype=np.uint32) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1, count + 1).astype(dtype), np.zeros(count, dtype)


@pytest.mark.parametrize(
    ("load", "store", "size"),
    [
        ("ld.global.b32 { %r10 }, [ %rd11 + 0 ]", "st.global.b32 [ %rd12 + 0 ], { %r10 }", 4),
        ("ld.global.b64 %rd20, [%rd11]", "st.global.b64 [%rd12], %rd20", 8),
        ("ld.global.b16 %rs1, [%rd11]", "st.global.b16 [%rd12], %rs1", 2),
        ("ld.global.b8 %rs1, [%rd11]", "st.global.b8 [%rd12], %rs1", 1),
        ("ld.global.v2.b32 {%r10, %r11}, [%rd11]", "st.global.v2.b32 [%rd12], {%r10, %r11}", 8),
        (
            "ld.global.L1::evict_last.v4.b32 {%r10, %r11, %r12, %r13}, [%rd11]",
            "st.global.v4.b32 [%rd12], {%r10, %r11, %r12, %r13}",
            16,
        ),
        ("ld.acquire.gpu.global.b32 %r10, [%rd11]", "st.global.b32 [%rd12], %r10", 4),
        ("ld.global.cg.b32 %r10, [%rd11]", "st.global.wb.b32 [%rd12], %r10", 4),
    ],
)
def test_what_is_loaded_is_stored(load: str, store: str, size: int):
    source, target = arrays(32 * size, np.uint8)
    run_snippet(body(size, f"{load};", f"{store};"), source, target)
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("kind", ["s", "u"])
def test_narrow_loads_are_extended(kind: str):
    source, target = np.full(32, 0xFE, np.uint8), np.zeros(32, np.uint32)
    lines = f"add.s64 %rd13, %rd0, 0; ld.global.{kind}8 %r10, [%rd13]; st.global.b32 [%rd12], %r10;"
    run_snippet(body(4, lines), source, target)
    assert (target == (0xFFFFFFFE if kind == "s" else 0xFE)).all()


def test_lanes_that_are_masked_access_nothing():
    source, target = arrays()
    lines = "setp.lt.u32 %p1, %r0, 3; mov.b32 %r10, 9; @%p1 ld.global.b32 %r10, [%rd11];"
    lines += "st.global.b32 [%rd12], %r10;"
    run_snippet(body(4, lines), source[:3], target)
    assert target.tolist() == [1, 2, 3, *[9] * 29]


@pytest.mark.parametrize(
    "access",
    [
        "ld.global.b32 %r10, [%rd11+4];",
        "ld.global.b32 %r10, [%rd11+-4];",
        "st.global.b32 [%rd11+4], %r0;",
        "ld.global.v2.b32 {%r10, %r11}, [%rd11];",
        "atom.global.gpu.relaxed.add.u32 %r10, [%rd11+4], 1;",
    ],
)
def test_an_access_one_past_a_buffer_is_a_fault(access: str):
    with pytest.raises(Fault, match=r"out of bounds of array 0 \(128 bytes\)|below all buffers"):
        run_snippet(body(4, access), *arrays())


def test_a_fault_names_the_instruction_the_program_and_the_line():
    lines = ".loc	1 17 0 // gpu.py:17:0\nst.global.b32 [%rd11+4], %r0;"
    expected = r"snippet, program \(0, 0, 0\), warp 0, line 17, `st.global.b32 \[%rd11\+4\], %r0`"
    with pytest.raises(Fault, match=expected):
        run_snippet(body(4, lines), *arrays())


@pytest.mark.parametrize(
    "access",
    [
        "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd11+8];",
        "st.global.b32 [%rd11+2], %r0;",
        "ld.shared.b32 %r10, [global_smem+1];",
        "st.shared.v2.b32 [global_smem+4], {%r0, %r0};",
    ],
)
def test_an_access_that_is_not_aligned_is_a_fault(access: str):
    with pytest.raises(Fault, match="not aligned"):
        run_snippet(body(16, access), *arrays(1024))


def test_shared_memory_ends_where_the_launch_says():
    with pytest.raises(Fault, match="out of bounds of shared memory"):
        run_snippet(body(4, "st.shared.b32 [global_smem+256], %r0;"), *arrays(), shared_bytes=256)


def test_a_register_is_not_read_before_it_is_written():
    with pytest.raises(Fault, match="_r10"):
        run_snippet(body(4, "st.global.b32 [%rd11], %r10;"), *arrays())


def test_values_travel_through_shared_memory():
    source, target = arrays(128)
    lines = [
        "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd11];",
        "shl.b32 %r20, %r0, 4; mov.b32 %r21, global_smem; add.s32 %r20, %r20, %r21;",
        "st.shared.v4.b32 [%r20], {%r10, %r11, %r12, %r13};",
        "ld.shared.v2.b32 {%r14, %r15}, [%r20+8]; ld.shared.s32 %rd20, [%r20];",
        "st.shared::cta.b32 [%r20], %r15; ld.shared.b32 %r16, [%r20];",
        "cvt.u32.u64 %r17, %rd20;",
        "st.global.v4.b32 [%rd12], {%r14, %r15, %r16, %r17};",
    ]
    run_snippet(body(16, *lines), source, target)
    rows = source.reshape(32, 4)
    np.testing.assert_array_equal(target.reshape(32, 4), rows[:, [2, 3, 3, 0]])


@pytest.mark.parametrize(
    ("access", "after", "smallest_old"),
    [
        ("atom.global.gpu.acq_rel.add.u32 %r10, [%rd0], 2;", 5 + 64, 5),
        ("atom.global.gpu.relaxed.add.s32 %r10, [%rd0], 2;", 5 + 64, 5),
        ("atom.global.gpu.relaxed.max.u32 %r10, [%rd0], %r0;", 31, 5),
        ("atom.global.gpu.relaxed.min.u32 %r10, [%rd0], %r0;", 0, 0),
        ("atom.global.gpu.relaxed.exch.b32 %r10, [%rd0], 7;", 7, 5),
        ("red.global.gpu.relaxed.add.u32 [%rd0], 2; mov.b32 %r10, 1;", 5 + 64, 1),
        (
            "st.shared.b32 [global_smem], 5; atom.relaxed.sys.shared.add.u32 %r10, [global_smem], 2;"
            "ld.shared.b32 %r11, [global_smem]; st.global.b32 [%rd0], %r11;",
            5 + 64,
            5,
        ),
        (
            "st.shared.b32 [global_smem], 5; red.shared.add.u32 [global_smem], 2; mov.b32 %r10, 1;"
            "ld.shared.b32 %r11, [global_smem]; st.global.b32 [%rd0], %r11;",
            5 + 64,
            1,
        ),
    ],
)
def test_every_lane_takes_its_turn_in_an_atomic(access: str, after: int, smallest_old: int):
    counter, old = np.array([5], np.uint32), np.zeros(32, np.uint32)
    run_snippet(body(4, access, "st.global.b32 [%rd12], %r10;"), counter, old)
    assert counter[0] == after
    assert old.min() == smallest_old


def test_floats_are_added_atomically():
    total = np.array([0.5], np.float32)
    run_snippet("atom.global.gpu.relaxed.add.f32 %r10, [%rd0], 0f3F800000;", total)
    assert total[0] == 32.5


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_arrive_when_they_are_waited_for_and_masked_ones_are_zero(size: int):
    how = "cg" if size == 16 else "ca"
    source, target = arrays(32 * size, np.uint8)
    lines = [
        f"mul.lo.s32 %r20, %r0, {size}; setp.lt.u32 %p1, %r0, 8; selp.b32 %r21, 0, {size}, %p1;",
        f"cp.async.{how}.shared.global [ %r20 + 0 ], [ %rd11 + 0 ], {size:#x}, %r21;",
        "cp.async.commit_group; cp.async.wait_group 0;",
        *[
            f"ld.shared.b32 %r30, [%r20+{i}]; st.global.b32 [%rd12+{i}], %r30;"
            for i in range(0, size, 4)
        ],
    ]
    for seed in range(4):
        run_snippet(body(size, *lines), source, target, seed=seed)
        assert not target[: 8 * size].any()
        np.testing.assert_array_equal(target[8 * size :], source[8 * size :])
