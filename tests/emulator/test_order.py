"""Warps and programs run in any order, and what must not depend on it is found out."""

import numpy as np
import pytest

from tests.emulator.memory import Fault
from tests.emulator.snippets import run_snippet

SEEDS = range(12)
OWN = """
shl.b32 %r10, %r0, 2; xor.b32 %r11, %r10, 128;
mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd0, %rd10;
"""
WRITE = f"{OWN} st.shared.b32 [%r10], %r0;"
# What the other warp wrote.
READ = "ld.shared.b32 %r12, [%r11]; st.global.b32 [%rd11], %r12;"


def test_warps_read_what_others_wrote_before_a_barrier():
    for seed in SEEDS:
        out = np.zeros(64, np.uint32)
        run_snippet(f"{WRITE} bar.sync 0; {READ}", out, threads=64, seed=seed)
        np.testing.assert_array_equal(out, np.arange(64) ^ 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_found_in_any_order(seed: int):
    with pytest.raises(Fault, match="another warp (wrote|read) since the last barrier"):
        run_snippet(f"{WRITE} {READ}", np.zeros(64, np.uint32), threads=64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_before_memory_is_used_again_is_found(seed: int):
    body = f"{WRITE} bar.sync 0; {READ} st.shared.b32 [%r10], 0;"
    with pytest.raises(Fault, match="another warp (wrote|read) since the last barrier"):
        run_snippet(body, np.zeros(64, np.uint32), threads=64, seed=seed)


def test_warps_may_write_the_same_value_but_not_two():
    run_snippet("st.shared.b32 [global_smem], 3;", threads=64)
    with pytest.raises(Fault, match="writes what another warp wrote"):
        run_snippet("st.shared.b32 [global_smem], %r0;", threads=64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "body",
    [
        f"{WRITE} atom.shared.add.u32 %r13, [%r11], 1;",
        f"{OWN} atom.shared.add.u32 %r13, [%r10], 1; ld.shared.b32 %r12, [%r11];",
    ],
    ids=["before", "after"],
)
def test_a_missing_barrier_beside_an_atomic_is_found(body: str, seed: int):
    with pytest.raises(Fault, match="another warp .* since the last barrier"):
        run_snippet(body, np.zeros(64, np.uint32), threads=64, seed=seed)


def test_warps_may_change_a_place_by_atomics():
    run_snippet("atom.shared.add.u32 %r13, [global_smem], 1;", threads=64)


def test_a_warp_that_leaves_while_others_wait_is_a_fault():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $L_end; bar.sync 0; $L_end:"
    with pytest.raises(Fault, match="waits at a barrier that other warps left behind"):
        run_snippet(body, threads=64)


def test_warps_may_branch_apart():
    body = (
        f"{OWN} setp.lt.u32 %p1, %r0, 32; @%p1 bra $L_end; mov.b32 %r0, 7; bra.uni $L_end; $L_end:"
    )
    out = np.zeros(64, np.uint32)
    run_snippet(f"{body} st.global.b32 [%rd11], %r0;", out, threads=64)
    assert out.tolist() == [*range(32), *[7] * 32]


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra $L_end; shfl.sync.idx.b32 %r2, %r0, 0, 31, -1; $L_end:",
        "setp.lt.u32 %p1, %r0, 16; @%p1 ret;",
        "mov.b32 %r2, 0; $L_loop: add.s32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, %r0; @%p1 bra $L_loop;",
    ],
    ids=["over a shuffle", "out of the kernel", "out of a loop"],
)
def test_lanes_that_part_are_a_fault(body: str):
    with pytest.raises(Fault, match="lanes of a warp part"):
        run_snippet(body)


def test_lanes_may_skip_a_few_instructions():
    out = np.zeros(32, np.uint32)
    body = f"{OWN} setp.lt.u32 %p1, %r0, 16; @%p1 bra $L_end; setp.eq.u32 %p2, %r0, 20;"
    body += "add.s32 %r0, %r0, 100; @%p2 mov.b32 %r0, 1; $L_end: st.global.b32 [%rd11], %r0;"
    run_snippet(body, out)
    assert out.tolist() == [*range(16), *range(116, 120), 1, *range(121, 132)]


def test_a_loop_ends():
    out = np.zeros(32, np.uint32)
    body = f"{OWN} mov.b32 %r2, 0; $L_loop: add.s32 %r2, %r2, 3; setp.lt.u32 %p1, %r2, 10;"
    run_snippet(f"{body} @%p1 bra $L_loop; st.global.b32 [%rd11], %r2;", out)
    assert (out == 12).all()


def test_copies_that_nobody_waits_for_are_sometimes_late():
    body = f"{OWN} cp.async.ca.shared.global [%r10], [%rd11], 4; cp.async.commit_group;"
    body += "cp.async.wait_group 1; ld.shared.b32 %r12, [%r10]; st.global.b32 [%rd11], %r12;"
    seen = set()
    for seed in SEEDS:
        out = np.full(32, 5, np.uint32)
        run_snippet(body, out, seed=seed)
        seen.add(int(out[0]))
    assert seen == {5, 0xA5A5A5A5}


# Each thread writes 1; the last program by its ticket adds up what all have written.
TICKET = """
mul.wide.u32 %rd10, %r0, 4; mul.wide.u32 %rd11, %r1, 256; add.s64 %rd12, %rd0, %rd10;
add.s64 %rd13, %rd12, %rd11; setp.eq.u32 %p1, %r0, 0;
st.global.b32 [%rd13], 1;
{barrier}
fence.acq_rel.gpu;
@%p1 atom.global.gpu.acq_rel.add.u32 %r10, [%rd1], 1;
@%p1 st.shared.b32 [global_smem], %r10;
bar.sync 0;
ld.shared.b32 %r11, [global_smem];
setp.ne.u32 %p2, %r11, 7;
@%p2 bra $L_end;
mov.b32 %r12, 0; mov.b32 %r13, 0;
$L_loop:
ld.global.b32 %r14, [%rd12]; add.s32 %r12, %r12, %r14; add.s64 %rd12, %rd12, 256;
add.s32 %r13, %r13, 1; setp.lt.u32 %p3, %r13, 8; @%p3 bra $L_loop;
add.s64 %rd14, %rd2, %rd10; st.global.b32 [%rd14], %r12;
st.global.b32 [%rd3], %r1;
$L_end:
"""


def combine(barrier: str, seed: int) -> tuple[np.ndarray, int]:
    """Sums of the last of eight programs, and which program that was."""
    parts, ticket = np.zeros(8 * 64, np.uint32), np.zeros(1, np.uint32)
    sums, last = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
    body = TICKET.format(barrier=barrier)
    run_snippet(body, parts, ticket, sums, last, threads=64, programs=8, seed=seed)
    return sums, int(last[0])


def test_the_last_program_may_be_any_and_sees_what_all_have_written():
    outcomes = [combine("bar.sync 0; membar.gl;", seed) for seed in SEEDS]
    assert all((sums == 8).all() for sums, _ in outcomes)
    assert len({last for _, last in outcomes}) > 3


def test_a_ticket_that_is_taken_before_all_warps_have_written_is_found_by_some_seed():
    outcomes = [combine("", seed) for seed in SEEDS]
    assert any((sums != 8).any() for sums, _ in outcomes)


def test_a_seed_decides_the_order():
    outcomes = [[int(combine("", seed)[0].sum()) for seed in SEEDS] for _ in range(2)]
    assert outcomes[0] == outcomes[1]
