"""The table of the modelled instructions.

A row is a pattern of opcodes and what such an instruction computes, in Python, of its sources `a`, `b`, `c`
and so on. In a pattern,

    <int>      is a type of that kind, which the result calls `T`; <S:int> is one that it calls `S`
    {x|y}      is one of these
    [x]        may be there
    <how>      is any of the words that order, cache or scope an access
    <vector>   may be .v2 or .v4; the result calls the number COUNT

and in types and results,

    T          the type of the pattern
    B          as many bits as T, without a sign: whole numbers wrap
    W          T, read as a type of twice as many bits; `D` is that type
    T*         all parts of a vector
    BITS       how many bits T has
    mask       the lanes in which the instruction takes effect
    old        the destination before
    sources    all sources

An opcode that no row matches is a fault, with its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from tests.emulator.memory import Fault

BARRIER, SWITCH = "barrier", "switch"


@dataclass(frozen=True)
class Row:
    """How one kind of instruction is executed.

    Args:
        pattern: of its opcodes.
        result: Python; nothing is computed if it is empty.
        takes: types of the sources; the last one counts for all that follow.
        gives: types of the destinations, nothing if there is none.
        pauses: the warp waits at a BARRIER, or lets other programs go on before it (SWITCH).
    """

    pattern: str
    result: str
    takes: str = "T"
    gives: str = "T"
    pauses: str = ""


@dataclass(frozen=True)
class Match:
    """A row for an opcode; the names of the types in it as far as its pattern has them."""

    row: Row
    types: dict[str, str]
    count: int


TABLE = (
    # Moves. A register of 32 bits may be given as its halves, and so on.
    Row("mov.<any>", "a", "B", "B"),
    Row("mov.pred", "a", "pred", "pred"),
    Row("selp.<any>", "where(c, a, b)", "B B pred", "B"),
    # Whole numbers.
    Row("add.<int>", "a + b", "B", "B"),
    Row("sub.<int>", "a - b", "B", "B"),
    Row("mul.lo.<int>", "a * b", "B", "B"),
    Row("mad.lo.<int>", "a * b + c", "B", "B"),
    Row("mul.wide.<short>", "a * b", "W", "D"),
    Row("mad.wide.<short>", "a * b + c", "W W D", "D"),
    Row("mul.hi.<short>", "(a * b >> BITS).astype(T)", "W"),
    Row("div.<int>", "divide(a, b)"),
    Row("rem.<int>", "fmod(a, b)"),
    Row("neg.<int>", "-a"),
    Row("abs.<int>", "absolute(a)"),
    Row("min.<int>", "minimum(a, b)"),
    Row("max.<int>", "maximum(a, b)"),
    Row("max.relu.<short>", "maximum(maximum(a, b), 0)"),
    # Bits.
    Row("and.<logic>", "a & b"),
    Row("or.<logic>", "a | b"),
    Row("xor.<logic>", "a ^ b"),
    Row("not.<logic>", "~a"),
    Row("shl.<bits>", "a << b"),
    Row("shr.<any>", "a >> b"),
    Row("bfe.u32", "a >> b & (1 << c) - 1", "u32", "u32"),
    Row("bfe.s32", "a << 32 - b - c >> 32 - c", "s32", "s32"),
    Row("popc.b32", "count_bits(a)", "b32", "b32"),
    Row("clz.b32", "leading_zeros(a)", "b32", "b32"),
    Row("prmt.b32", "permute(a, b, c)", "b32", "b32"),
    # Floats.
    Row("add<round>.<float>", "a + b"),
    Row("sub<round>.<float>", "a - b"),
    Row("mul<round>.<float>", "a * b"),
    Row("fma<round>.f32", "fused(a, b, c)", "f32", "f32"),
    Row("div<round>.f32", "a / b", "f32", "f32"),
    Row("rcp<round>.f32", "1 / a", "f32", "f32"),
    Row("sqrt<round>.f32", "sqrt(a)", "f32", "f32"),
    Row("rsqrt<round>.f32", "1 / sqrt(a)", "f32", "f32"),
    Row("ex2<round>.f32", "exp2(a)", "f32", "f32"),
    Row("lg2<round>.f32", "log2(a)", "f32", "f32"),
    Row("tanh<round>.f32", "tanh(a)", "f32", "f32"),
    Row("neg<round>.<float>", "-a"),
    Row("abs<round>.<float>", "absolute(a)"),
    Row("copysign.f32", "copysign(b, a)", "f32", "f32"),
    Row("min<round>.<float>", "fmin(a, b)"),
    Row("max<round>.<float>", "fmax(a, b)"),
    Row("min<round>.NaN.<float>", "minimum(a, b)"),
    Row("max<round>.NaN.<float>", "maximum(a, b)"),
    # Comparisons. Those of floats are false if one is NaN, but for `ne` and those with a u.
    Row("setp.eq.<whole>", "a == b", gives="pred"),
    Row("setp.ne.<whole>", "a != b", gives="pred"),
    Row("setp.{lt|lo}.<whole>", "a < b", gives="pred"),
    Row("setp.{le|ls}.<whole>", "a <= b", gives="pred"),
    Row("setp.{gt|hi}.<whole>", "a > b", gives="pred"),
    Row("setp.{ge|hs}.<whole>", "a >= b", gives="pred"),
    Row("setp.eq<round>.<float>", "a == b", gives="pred"),
    Row("setp.ne<round>.<float>", "(a < b) | (a > b)", gives="pred"),
    Row("setp.lt<round>.<float>", "a < b", gives="pred"),
    Row("setp.le<round>.<float>", "a <= b", gives="pred"),
    Row("setp.gt<round>.<float>", "a > b", gives="pred"),
    Row("setp.ge<round>.<float>", "a >= b", gives="pred"),
    Row("setp.equ<round>.<float>", "~((a < b) | (a > b))", gives="pred"),
    Row("setp.neu<round>.<float>", "a != b", gives="pred"),
    Row("setp.ltu<round>.<float>", "~(a >= b)", gives="pred"),
    Row("setp.leu<round>.<float>", "~(a > b)", gives="pred"),
    Row("setp.gtu<round>.<float>", "~(a <= b)", gives="pred"),
    Row("setp.geu<round>.<float>", "~(a < b)", gives="pred"),
    Row("setp.num<round>.<float>", "(a == a) & (b == b)", gives="pred"),
    Row("setp.nan<round>.<float>", "(a != a) | (b != b)", gives="pred"),
    # Conversions.
    Row("cvt.<whole>.<S:whole>", "a.astype(T)", "S"),
    Row("cvt.rn.<float>.<S:whole>", "a.astype(T)", "S"),
    Row("cvt.rzi<round>.<whole>.f32", "saturated(trunc(a), T)", "f32"),
    Row("cvt.rni<round>.<whole>.f32", "saturated(rint(a), T)", "f32"),
    Row("cvt.rmi<round>.<whole>.f32", "saturated(floor(a), T)", "f32"),
    Row("cvt.rpi<round>.<whole>.f32", "saturated(ceil(a), T)", "f32"),
    Row("cvt.rzi<round>.f32.f32", "trunc(a)", "f32", "f32"),
    Row("cvt.rni<round>.f32.f32", "rint(a)", "f32", "f32"),
    Row("cvt.rmi<round>.f32.f32", "floor(a)", "f32", "f32"),
    Row("cvt.rpi<round>.f32.f32", "ceil(a)", "f32", "f32"),
    Row("cvt.f32.f16", "a.astype(f32)", "f16", "f32"),
    Row("cvt.rn.f16.f32", "a.astype(f16)", "f32", "f16"),
    Row("cvt.f32.bf16", "widen_bf16(a)", "b16", "f32"),
    Row("cvt.rn.bf16.f32", "to_bf16(a)", "f32", "b16"),
    Row("cvt[.rn].bf16.f16", "to_bf16(a.astype(f32))", "f16", "b16"),
    Row("cvt.rn.bf16x2.f32", "pair(to_bf16(b), to_bf16(a))", "f32", "b32"),
    Row(
        "cvt.rn.f16x2.f32",
        "pair(b.astype(f16).view(u16), a.astype(f16).view(u16))",
        "f32",
        "b32",
    ),
    Row("cvt.rn.f16x2.e4m3x2", "pair(from_fp8(a, e4m3), from_fp8(a >> 8, e4m3))", "b16", "b32"),
    Row("cvt.rn.f16x2.e5m2x2", "pair(from_fp8(a, e5m2), from_fp8(a >> 8, e5m2))", "b16", "b32"),
    # Between the lanes of a warp, all of which take part.
    Row("shfl.sync.up.b32", "shuffle('up', a, b, c)", "b32", "b32 pred"),
    Row("shfl.sync.down.b32", "shuffle('down', a, b, c)", "b32", "b32 pred"),
    Row("shfl.sync.bfly.b32", "shuffle('bfly', a, b, c)", "b32", "b32 pred"),
    Row("shfl.sync.idx.b32", "shuffle('idx', a, b, c)", "b32", "b32 pred"),
    Row("redux.sync.add.<short>", "spread(add.reduce(a, dtype=T), T)"),
    Row("redux.sync.min.<short>", "spread(minimum.reduce(a), T)"),
    Row("redux.sync.max.<short>", "spread(maximum.reduce(a), T)"),
    Row("vote.sync.ballot.b32", "ballot(a)", "pred", "b32"),
    Row("vote.sync.any.pred", "spread(a.any(), pred)", "pred", "pred"),
    Row("vote.sync.all.pred", "spread(a.all(), pred)", "pred", "pred"),
    Row("elect.sync", "(spread(0, u32), LANES == 0)", "b32", "b32 pred"),
    Row("bar.warp.sync", "", gives=""),
    # Memory. Before an access that others may wait for, other programs may go on.
    Row("ld.param.<any>", "parameters[a]"),
    Row(
        "ld.{acquire|relaxed|volatile}<how>.global<how>.<any>",
        "load(a, mask, T)",
        gives="T*",
        pauses=SWITCH,
    ),
    Row("ld<how>.global<how><vector>.<any>", "load(a, mask, T, COUNT)", gives="T*"),
    Row("st<how>.global<how><vector>.<any>", "store(a, mask, B, b)", "B B*", ""),
    Row("ld<how>.shared<how><vector>.<any>", "load_shared(a, mask, T, COUNT)", gives="T*"),
    Row("st<how>.shared<how><vector>.<any>", "store_shared(a, mask, B, b)", "B B*", ""),
    Row("atom<how>.global<how>.add<how>.<any>", "atomic(add, a, mask, T, b)", pauses=SWITCH),
    Row("atom<how>.global<how>.min<how>.<any>", "atomic(minimum, a, mask, T, b)", pauses=SWITCH),
    Row("atom<how>.global<how>.max<how>.<any>", "atomic(maximum, a, mask, T, b)", pauses=SWITCH),
    Row("atom<how>.global<how>.exch<how>.<any>", "atomic(second, a, mask, T, b)", pauses=SWITCH),
    Row("red<how>.global<how>.add<how>.<any>", "atomic(add, a, mask, T, b)", "T", "", SWITCH),
    Row("atom<how>.shared<how>.add<how>.<any>", "atomic_shared(add, a, mask, T, b)"),
    Row("red<how>.shared<how>.add<how>.<any>", "atomic_shared(add, a, mask, T, b)", "T", ""),
    Row("membar.{cta|gl|sys}", "", gives="", pauses=SWITCH),
    Row("fence.{acq_rel|sc}<how>", "", gives="", pauses=SWITCH),
    Row("fence.proxy.async<how>", "", gives=""),
    # Copies to shared memory, done now or when they are waited for.
    Row("cp.async.{ca|cg}.shared<how>.global<how>", "warp.copy(mask, *sources)", "b32", ""),
    Row("cp.async.commit_group", "warp.commit_copies()", gives=""),
    Row("cp.async.wait_group", "warp.wait_for_copies(int(a))", "s32", ""),
    # Matrices.
    Row("ldmatrix.<tiles>.shared<how>.b16", "load_tiles(shared, a, COUNT)", "b32", "b32*"),
    Row(
        "ldmatrix.<tiles>.trans.shared<how>.b16",
        "load_tiles(shared, a, COUNT, True)",
        "b32",
        "b32*",
    ),
    Row("stmatrix.<tiles>.shared<how>.b16", "store_tiles(shared, a, b)", "b32 b32*", ""),
    Row(
        "stmatrix.<tiles>.trans.shared<how>.b16", "store_tiles(shared, a, b, True)", "b32 b32*", ""
    ),
    Row("mma.<16x8x16>.f32.bf16.bf16.f32", "multiply(bf16, a, b, c)", "b32* b32* f32*", "f32*"),
    Row("mma.<16x8x16>.f32.f16.f16.f32", "multiply(half, a, b, c)", "b32* b32* f32*", "f32*"),
    Row(
        "wgmma.<64xNx16>.f32.bf16.bf16",
        "multiply_shared(bf16, shared, old, *sources)",
        "b32* b64 pred s32",
        "f32*",
    ),
    Row(
        "wgmma.<64xNx16>.f32.f16.f16",
        "multiply_shared(half, shared, old, *sources)",
        "b32* b64 pred s32",
        "f32*",
    ),
    Row("wgmma.{fence|commit_group|wait_group}.sync.aligned", "", gives=""),
    # All warps of a program meet.
    Row("bar.sync", "", gives="", pauses=BARRIER),
)

_WORDS = (
    r"(?:::\w+)?(?:\.(?:relaxed|acquire|release|acq_rel|weak|volatile|nc|ca|cg|cs|wb|wt"
    r"|cta|gpu|sys|\w*::\w+))*"
)
_CLASSES = {
    "int": "[su](?:16|32|64)",
    "short": "[su](?:16|32)",
    "bits": "b(?:16|32|64)",
    "logic": "b(?:16|32|64)|pred",
    "whole": "[bsu](?:8|16|32|64)",
    "float": "f(?:32|64)",
    "any": "[bsu](?:8|16|32|64)|f(?:32|64)",
}
_PLACES = {
    "how": _WORDS,
    "round": r"(?:\.(?:rn|approx|full|ftz))*",
    "vector": r"(?:\.v(?P<count>\d))?",
    "tiles": r"sync\.aligned\.m8n8\.x(?P<count>\d)",
    "16x8x16": r"sync\.aligned\.m16n8k16\.row\.col",
    "64xNx16": r"mma_async\.sync\.aligned\.m64n(?P<count>\d+)k16",
}


def _expression(pattern: str) -> re.Pattern[str]:
    """The regular expression of a row's pattern."""

    def place(match: re.Match[str]) -> str:
        name, _, kind = match[1].rpartition(":")
        return _PLACES.get(kind) or f"(?P<{name or 'T'}>{_CLASSES[kind]})"

    text = pattern.replace(".", r"\.")
    text = re.sub(r"\[([^]]*)\]", r"(?:\1)?", text)
    text = re.sub(r"\{([^}]*)\}", r"(?:\1)", text)
    return re.compile(re.sub(r"<([\w:]+)>", place, text))


_EXPRESSIONS = [(_expression(row.pattern), row) for row in TABLE]


@cache
def find(opcode: str) -> Match:
    """The row of an opcode.

    Raises:
        Fault: it is not modelled.
    """
    for expression, row in _EXPRESSIONS:
        match = expression.fullmatch(opcode)
        if match:
            groups = match.groupdict()
            count = int(groups.pop("count", None) or 1)
            return Match(row, {key: name for key, name in groups.items() if name}, count)
    raise Fault(f"{opcode} is not modelled")
