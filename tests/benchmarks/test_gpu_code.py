"""Counts of compiled kernels: instructions are told apart, and runs stand beside each other."""

from rich.console import Console

from benchmarks.gpu_code.counts import layers
from benchmarks.gpu_code.sass import count_instructions
from benchmarks.gpu_code.tables import kernel_table, layer_table, paired

SASS = """
	code for sm_90a
		Function : _score
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;                 /* 0x0000000402048981 */
        /*0020*/              @P1  STS [R9+0x10], R4 ;                     /* 0x0000100409001388 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;           /* 0x0000000000007b1d */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R8 ;       /* 0x0000000008187df0 */
        /*0050*/              @UP0 MEMBAR.SC.GPU ;                         /* 0x0000000000007992 */
        /*0060*/                   ATOMG.E.ADD.STRONG.GPU PT, R6, [R2] ;   /* 0x0000000402067980 */
        /*10070*/                  EXIT ;                                  /* 0x000000000000794d */
        /*10080*/                  NOP ;                                   /* 0x0000000000007918 */
"""


def kernel(name: str, registers: int) -> dict:
    counted = {"stack_bytes": 0, "shared_bytes": 0, "instructions": count_instructions(SASS)}
    return {"kernel": name, "variant": "D128", "registers": registers, **counted}


def test_instructions_are_counted_by_kind_and_padding_is_none():
    found = count_instructions(SASS)
    assert found.pop("all") == 8
    kinds = {"global", "shared", "barriers", "tensor", "membars", "atomics"}
    assert {kind for kind, count in found.items() if count} == kinds
    assert sum(found.values()) == 6


def test_runs_stand_beside_each_other_with_what_only_one_of_them_has():
    before, after = [kernel("_old", 40), kernel("_both", 50)], [kernel("_both", 60)]
    pairs = paired(before, after, ("kernel", "variant"))
    names = [(old.get("kernel"), new.get("kernel")) for old, new in pairs]
    assert names == [("_both", "_both"), ("_old", None)]
    reports = [{"architecture": 90, "kernels": kernels} for kernels in (before, after)]
    console = Console(width=250, record=True)
    console.print(kernel_table(reports[1], reports[0]))
    printed = console.export_text()
    assert "50 -> 60" in printed
    assert "40 -> -" in printed


def test_the_launches_of_every_kind_of_layer_are_told():
    found = list(layers())
    assert {row["layer"] for row in found} == {"reselecting", "reusing", "following", "dense"}
    assert all(row["launches"] >= len(row["kernels"]) > 0 for row in found)
    assert len(layer_table({"layers": found}, None).rows) == len(found)
