"""Writes a Python generator for a kernel, which runs one warp.

A register is a local variable that holds an array [lanes] of its bits, unsigned; a predicate holds bools.
Nothing changes such an array: an instruction makes a new one. The generator yields where the warp waits
for others (`BARRIER`) or lets them go on (`SWITCH`).

All lanes take a branch, or none does. An exception is a branch over a few instructions on: lanes that do
not take it are masked in, and all lanes meet behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from tests.emulator import lanes, matrix
from tests.emulator.instructions import BARRIER, SWITCH, Row, find
from tests.emulator.memory import Fault
from tests.emulator.operands import Constants, Type, read, read_parts, to_bits, type_of
from tests.emulator.parse import (
    Block,
    Entry,
    Instruction,
    Negated,
    Number,
    Operand,
    Register,
    Symbol,
    Vector,
    parse,
)

MOST_MASKED = 32  # instructions that a branch of some lanes may skip
# What the results of the table name.
NAMES: dict[str, Any] = {
    **{name: getattr(np, name) for name in np.__all__ if not name.startswith("_")},
    **{name: value for name, value in vars(lanes).items() if not name.startswith("_")},
    **{name: value for name, value in vars(matrix).items() if not name.startswith("_")},
    **lanes.TYPES,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "second": lambda first, second: second,
    "BARRIER": BARRIER,
    "SWITCH": SWITCH,
    "Fault": Fault,
}
PROLOGUE = """def run_warp(warp):
    if False: yield
    parameters, memory, shared = warp.parameters, warp.memory, warp.shared
    load, store, atomic = memory.load, memory.store, memory.atomic
    load_shared, store_shared, atomic_shared = shared.load, shared.store, shared.atomic
    block = 0
    # registers
    while True:"""


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be run.

    Args:
        run_warp: makes a generator, of a `run.Warp`.
        instructions: what each line of its source was written for.
    """

    entry: Entry
    run_warp: Callable[[Any], Iterator[str]]
    instructions: dict[int, Instruction]

    def instruction_of(self, trace: TracebackType | None) -> Instruction | None:
        """The instruction that raised."""
        found = None
        while trace is not None:
            if trace.tb_frame.f_code.co_name == "run_warp":
                found = self.instructions.get(trace.tb_lineno)
            trace = trace.tb_next
        return found


def translate(text: str, name: str) -> Kernel:
    """Read the PTX of the kernel `name`.

    Raises:
        Fault: an instruction that is not modelled.
    """
    entry = parse(text, name)
    writer = _Writer(entry)
    names = {**NAMES, **writer.constants.values}
    exec(compile("\n".join(writer.lines), f"<ptx of {name}>", "exec"), names)
    return Kernel(entry, names["run_warp"], writer.instructions)


class _Writer:
    """The lines of a generator."""

    def __init__(self, entry: Entry) -> None:
        self.lines = PROLOGUE.splitlines()
        self.instructions: dict[int, Instruction] = {}
        self.constants = Constants()
        self._blocks = entry.blocks
        self._numbers = {label: i for i, block in enumerate(entry.blocks) for label in block.labels}
        self._kept: dict[str, int] = {}  # registers that lanes may keep before they are set
        number = 0
        while number < len(self._blocks):
            number = self._write_block(number)
        self._add(f"if block >= {number}: return", 2)
        registers = [f"{name} = zeros(32, {to_name(bits)})" for name, bits in self._kept.items()]
        self.lines[self.lines.index("    # registers")] = f"    {'; '.join(registers)}"

    def _add(self, code: str, depth: int, instruction: Instruction | None = None) -> None:
        self.lines.append("    " * depth + code)
        if instruction:
            self.instructions[len(self.lines)] = instruction

    def _write_block(self, number: int) -> int:
        """Write a block, and those behind it that its branch may skip; return the next one's number."""
        self._add(f"if block == {number}:", 2)
        following = number + 1
        for instruction in self._blocks[number].instructions:
            kind = instruction.opcode.split(".")[0]
            if kind in ("ret", "exit"):
                self._write_uniform(instruction, "return")
            elif kind == "bra":
                target = self._numbers[instruction.operands[0].name]
                skipped = self._blocks[following:target]
                if instruction.guard and self._may_mask(skipped):
                    self._write_masked(instruction, skipped)
                    following = target
                else:
                    self._write_uniform(instruction, f"block = {target}; continue")
            else:
                self._write(instruction, 3, None)
        self._add(f"block = {following}", 3)
        return following

    def _may_mask(self, blocks: tuple[Block, ...]) -> bool:
        """Whether a branch skips a few instructions that any lanes may run without the others."""
        instructions = [each for block in blocks for each in block.instructions]
        return (
            bool(instructions)
            and len(instructions) <= MOST_MASKED
            and not any(block.labels for block in blocks)
            and not any(
                each.opcode.split(".")[0] in ("bra", "ret", "exit", "bar") or ".sync" in each.opcode
                for each in instructions
            )
        )

    def _write_masked(self, branch: Instruction, blocks: tuple[Block, ...]) -> None:
        name = f"staying_{len(self.lines)}"
        self._add(f"{name} = ~{_predicate(branch.guard)}", 3, branch)
        self._add(f"if {name}.tobytes() != NONE:", 3, branch)
        for block in blocks:
            for instruction in block.instructions:
                self._write(instruction, 4, name)

    def _write_uniform(self, instruction: Instruction, code: str) -> None:
        if instruction.guard is None:
            self._add(code, 3, instruction)
            return
        self._add(f"taken = {_predicate(instruction.guard)}.tobytes()", 3, instruction)
        self._add(f"if taken == EVERY: {code}", 3, instruction)
        self._add("if taken != NONE: raise Fault('the lanes of a warp part')", 3, instruction)

    def _write(self, instruction: Instruction, depth: int, staying: str | None) -> None:
        """Write an instruction; `staying` is the mask of lanes that did not branch over it."""
        row = find(instruction.opcode).row
        for line in self._statements(instruction, row, staying):
            self._add(line, depth, instruction)

    def _statements(self, instruction: Instruction, row: Row, staying: str | None) -> Iterator[str]:
        mask = staying
        if instruction.guard is not None:
            mask = _predicate(instruction.guard)
            if staying:
                yield f"here = {staying} & {mask}"
                mask = "here"
        if row.pauses:
            if row.pauses == BARRIER and instruction.operands != (Number(0),):
                raise Fault(f"{instruction.text}: a barrier of some warps is not modelled")
            yield f"yield {row.pauses.upper()}"
        if not row.result:
            return
        code = self._result(instruction, row, mask or "ALL")
        if not row.gives:
            if mask and "mask" not in row.result:
                raise Fault(f"{instruction.text}: not modelled for some lanes only")
            yield code
            return
        match, destination = find(instruction.opcode), instruction.operands[0]
        kinds = [type_of(word.rstrip("*"), match) for word in row.gives.split()]
        parts = destination.parts if isinstance(destination, Vector) else (destination,)
        if row.gives.endswith("*"):
            kinds *= len(parts)
        elif len(kinds) == 1 and len(parts) > 1:
            bits = kinds[0].bits // len(parts)
            yield f"whole = {code}"
            code = ", ".join(f"(whole >> {i * bits}).astype(u{bits})" for i in range(len(parts)))
            kinds = [Type("u", bits)] * len(parts)
        elif len(kinds) == 1:
            yield self._assign(parts[0], code, kinds[0], mask)
            return
        yield f"found = {code}"
        for i, (part, kind) in enumerate(zip(parts, kinds, strict=False)):
            if part is not None:
                yield self._assign(part, f"found[{i}]", kind, mask)

    def _assign(self, register: Register, code: str, kind: Type, mask: str | None) -> str:
        code = to_bits(code, kind, register.bits)
        if mask is None:
            return f"{register.name} = {code}"
        self._kept[register.name] = register.bits
        return f"{register.name} = where({mask}, {code}, {register.name})"

    def _result(self, instruction: Instruction, row: Row, mask: str) -> str:
        """The row's result, with this instruction's operands and types in it."""
        match, operands = find(instruction.opcode), instruction.operands
        sources = operands[1:] if row.gives else operands
        takes = row.takes.split()
        spread = bool(row.gives) and all(isinstance(each, Number | Symbol) for each in sources)

        def source(number: int) -> str:
            word = takes[min(number, len(takes) - 1)]
            return self._read(sources[number], word, type_of(word.rstrip("*"), match), spread)

        def place(token: re.Match[str]) -> str:
            word = token[0]
            if word in "abc":
                return source("abc".index(word))
            if word == "sources":
                return f"({' '.join(source(i) + ',' for i in range(len(sources)))})"
            if word == "old":
                # It may be added to nothing, and was never set then.
                self._kept.update({each.name: each.bits for each in operands[0].parts})
                word = row.gives
                return self._read(operands[0], word, type_of(word.rstrip("*"), match), False)
            if word == "BITS":
                return str(type_of("T", match).bits)
            return {"mask": mask, "COUNT": str(match.count)}.get(word) or type_of(word, match).name

        return re.sub(r"\b(?:[abcTB]|BITS|COUNT|mask|old|sources)\b", place, row.result)

    def _read(self, operand: Operand, word: str, kind: Type, spread: bool) -> str:
        if word.endswith("*"):
            return read_parts(operand, kind, self.constants)
        return read(operand, kind, self.constants, spread)


def to_name(bits: int) -> str:
    return "pred" if bits == 1 else f"u{bits}"


def _predicate(guard: Register | Negated) -> str:
    return guard.name if isinstance(guard, Register) else f"(~{guard.register.name})"
