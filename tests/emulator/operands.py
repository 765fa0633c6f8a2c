"""Operands of PTX as expressions of Python, typed as an instruction wants them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tests.emulator.instructions import Match
from tests.emulator.lanes import NUM_LANES, TYPES
from tests.emulator.memory import Fault
from tests.emulator.parse import (
    Address,
    Negated,
    Number,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)

SHARED_MEMORY = Symbol("global_smem")
SPECIALS = {
    "laneid": "LANES",
    "tid.x": "warp.thread",
    "ntid.x": "warp.threads",
    "ctaid.x": "warp.program[0]",
    "ctaid.y": "warp.program[1]",
    "ctaid.z": "warp.program[2]",
    "nctaid.x": "warp.programs[0]",
    "nctaid.y": "warp.programs[1]",
    "nctaid.z": "warp.programs[2]",
}


@dataclass(frozen=True)
class Type:
    """A type of PTX.

    Args:
        kind: b, u, s or f.
        bits: 1 for a predicate.
        widened: it is read from half as many bits.
    """

    kind: str
    bits: int
    widened: bool = False

    @property
    def stored_bits(self) -> int:
        return self.bits // 2 if self.widened else self.bits

    @property
    def name(self) -> str:
        return _name(self.kind, self.bits)


def _name(kind: str, bits: int) -> str:
    return "pred" if bits == 1 else f"{'u' if kind == 'b' else kind}{bits}"


@cache
def _named(name: str) -> Type:
    return Type("b", 1) if name == "pred" else Type(name[0], int(name[1:]))


def type_of(word: str, match: Match) -> Type:
    """The type that a row of the table calls so, for an opcode that it matches."""
    if word not in ("B", "W", "D"):
        return _named(match.types.get(word, word))
    own = _named(match.types["T"])
    if word == "B":
        return Type("b", own.bits)
    return Type(own.kind, 2 * own.bits, widened=word == "W")


class Constants:
    """Immediates of a kernel, made once, by the names that the code calls them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[tuple[Type, int, bool], str] = {}

    def name(self, value: int, kind: Type, spread: bool) -> str:
        """The name of a number, or, if `spread`, of an array that has it in every lane."""
        bits = kind.stored_bits
        key = (kind, value % (1 << bits), spread)
        if key not in self._names:
            self._names[key] = f"K{len(self._names)}"
            if bits == 1:
                number = np.array(bool(value))
            else:
                number = np.array(key[1], f"u{bits // 8}").view(TYPES[_name(kind.kind, bits)])
            number = number.astype(TYPES[kind.name])[()]
            self.values[self._names[key]] = np.full(NUM_LANES, number) if spread else number
        return self._names[key]


def read(operand: Operand | None, kind: Type, constants: Constants, spread: bool) -> str:
    """An expression of an operand's value.

    Args:
        spread: whether numbers become arrays.
    """
    if isinstance(operand, Number):
        return constants.name(operand.value, kind, spread or kind.bits == 1)
    if operand == SHARED_MEMORY:
        return constants.name(0, kind, spread)
    if isinstance(operand, Register):
        return _converted(operand.name, operand.bits, kind)
    if isinstance(operand, Negated):
        return f"(~{operand.register.name})"
    if isinstance(operand, Special) and operand.name in SPECIALS:
        return _converted(SPECIALS[operand.name], 32, kind)
    if isinstance(operand, Address):
        return _address(operand, constants)
    if isinstance(operand, Vector):
        return _packed(operand, kind, constants)
    raise Fault(f"operand {operand} is not modelled")


def read_parts(operand: Operand, kind: Type, constants: Constants) -> str:
    """As a tuple of all parts of a vector."""
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    return f"({' '.join(read(part, kind, constants, spread=False) + ',' for part in parts)})"


def _converted(code: str, bits: int, kind: Type) -> str:
    """A register's bits as a type."""
    stored = kind.stored_bits
    if bits != stored:
        code += f".astype(u{stored})"
    if kind.kind in "sf":
        code += f".view({kind.kind}{stored})"
    return f"{code}.astype({kind.name})" if kind.widened else code


def _address(operand: Address, constants: Constants) -> str:
    """uint64 [lanes], or the name of a parameter as a string."""
    base, offset = operand.base, operand.offset
    if base == SHARED_MEMORY:
        return constants.name(offset, Type("u", 64), spread=True)
    if isinstance(base, Symbol) and not offset:
        return repr(base.name)
    if not isinstance(base, Register):
        raise Fault(f"address {operand} is not modelled")
    code = base.name
    if offset:
        code = f"({code} + {constants.name(offset, Type('u', base.bits), spread=False)})"
    return code if base.bits == 64 else f"{code}.astype(u64)"


def _packed(operand: Vector, kind: Type, constants: Constants) -> str:
    """The parts of a vector as one number, the first one lowest."""
    bits = kind.bits // len(operand.parts)
    parts = [
        f"({read(part, Type('u', bits), constants, spread=False)}.astype(u{kind.bits}) << {i * bits})"
        for i, part in enumerate(operand.parts)
    ]
    return f"({' | '.join(parts)})"


def to_bits(code: str, kind: Type, bits: int) -> str:
    """An expression of a type as the content of a register, which may be wider."""
    if kind.bits == bits:
        return f"({code}).view(u{bits})" if kind.kind in "sf" else code
    if kind.bits > bits:
        raise Fault(f"{kind.bits} bits in a register of {bits}")
    if kind.kind == "s":
        return f"({code}).astype(s{bits}).view(u{bits})"
    if kind.kind == "f":
        code = f"({code}).view(u{kind.bits})"
    return f"({code}).astype(u{bits})"
