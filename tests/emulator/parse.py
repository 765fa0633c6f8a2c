"""PTX text as instructions with operands, cut into blocks that are entered at their beginning only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from tests.emulator.memory import Fault


@dataclass(frozen=True)
class Register:
    """A register of the kernel or of a scope within it; `bits` is 1 for a predicate."""

    name: str  # a name in Python
    bits: int


@dataclass(frozen=True)
class Negated:
    """`!p`"""

    register: Register


@dataclass(frozen=True)
class Special:
    """A register that the hardware sets, as `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Number:
    """An immediate: a whole number, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """The name of a label, a parameter, or shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`"""

    base: Register | Symbol | Number
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or the two destinations of `a|b`. None is `_`: what comes there is dropped."""

    parts: tuple[Register | Number | None, ...]


Operand = Register | Negated | Special | Number | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        guard: it only takes effect in lanes where this predicate holds.
        line: of the source, 0 if unknown.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    text: str
    line: int


@dataclass
class Block:
    """Instructions that run one after the other, from a label or behind a branch on."""

    labels: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A kernel.

    Args:
        parameters: names, and the sizes in bits, in their order.
        threads: of a program.
    """

    name: str
    parameters: tuple[tuple[str, int], ...]
    threads: int
    blocks: tuple[Block, ...]


class _Scope:
    """Names of registers between two braces."""

    def __init__(self, number: int, outer: _Scope | None) -> None:
        self.number = number
        self.outer = outer
        self.names: dict[str, int] = {}
        self.ranges: dict[str, int] = {}  # `%r<9>` declares %r0 to %r8

    def declare(self, text: str) -> None:
        """Read `.reg .b32 %r<9>` or `.reg .b32 a, b`."""
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        bits = 1 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        for name in "".join(names.split()).split(","):
            if name.endswith(">"):
                self.ranges[name[: name.index("<")]] = bits
            else:
                self.names[name] = bits

    def find(self, name: str) -> Register | None:
        bits = self.names.get(name) or self.ranges.get(name.rstrip("0123456789"))
        if bits:
            return Register(
                f"_{name.lstrip(chr(37))}" + (f"_{self.number}" if self.outer else ""), bits
            )
        return self.outer.find(name) if self.outer else None


def parse(text: str, name: str) -> Entry:
    """Read the kernel `name`.

    Raises:
        Fault: an operand that is not understood.
    """
    start = text.index(f".entry {name}(")
    head, body = text[start:].split("\n{", 1)
    parameters = re.findall(r"\.param\s+\.[a-z]+(\d+)[^,)]*?(\w+_param_\d+)", head)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head)
    return Entry(
        name=name,
        parameters=tuple((symbol, int(bits)) for bits, symbol in parameters),
        threads=int(threads[1]),
        blocks=tuple(_blocks(_statements(body), set(re.findall(r"\bbra\S*\s+([\w$]+)", body)))),
    )


def _statements(body: str) -> Iterator[tuple[str, int]]:
    """Statements, labels with their colon and braces of scopes, each with its line of the source.

    Ends with the kernel's closing brace.
    """
    line, depth, statement = 0, 1, ""
    for text in body.splitlines():
        text = text.split("//")[0].strip()
        location = re.match(r"\.loc\s+\d+\s+(\d+)", text)
        if location:
            line = int(location[1])
            continue
        while text:
            label = re.match(r"(\$?\w+:)(?!:)\s*", text)
            if not statement and label:
                yield label[1], line
                text = text[label.end() :]
                continue
            if not statement and text[0] in "{}":
                depth += 1 if text[0] == "{" else -1
                if not depth:
                    return
                yield text[0], line
                text = text[1:].strip()
                continue
            piece, semicolon, text = text.partition(";")
            statement += f" {piece}"
            text = text.strip()
            if semicolon:
                yield statement.strip(), line
                statement = ""


def _blocks(statements: Iterator[tuple[str, int]], targets: set[str]) -> list[Block]:
    numbers = count(1)
    scope = _Scope(0, None)
    blocks = [Block()]
    for statement, line in statements:
        if statement == "{":
            scope = _Scope(next(numbers), scope)
        elif statement == "}":
            scope = scope.outer
        elif statement.startswith(".reg"):
            scope.declare(statement)
        elif statement.startswith("."):
            continue  # a hint, as .pragma
        elif statement.endswith(":") and statement[:-1] not in targets:
            continue  # a place for debuggers
        elif statement.endswith(":"):
            if blocks[-1].instructions:
                blocks.append(Block())
            blocks[-1].labels.append(statement[:-1])
        else:
            instruction = read_instruction(statement, line, scope)
            blocks[-1].instructions.append(instruction)
            if instruction.opcode.split(".")[0] in ("bra", "ret", "exit"):
                blocks.append(Block())
    return blocks


def read_instruction(text: str, line: int, scope: _Scope) -> Instruction:
    text = " ".join(text.split())
    guard, opcode, operands = re.match(r"(?:@(\S+) )?([\w.:]+) ?(.*)", text).groups()
    return Instruction(
        opcode=opcode,
        operands=tuple(_operand(each, scope) for each in _split(operands)),
        guard=None if guard is None else _operand(guard, scope),
        text=text,
        line=line,
    )


def _split(operands: str) -> list[str]:
    """Cut at the commas that are in no brackets."""
    return [each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands)]


def _operand(text: str, scope: _Scope) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_part(each.strip(), scope) for each in text[1:-1].split(",")))
    if text.startswith("["):
        base, offset = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text).groups()
        return Address(_operand(base, scope), int(offset or "0", 0))
    if text.startswith("!"):
        return Negated(scope.find(text[1:]))
    if "|" in text:
        return Vector(tuple(_part(each, scope) for each in text.split("|")))
    register = scope.find(text)
    if register:
        return register
    if text.startswith("%"):
        return Special(text[1:])
    if re.match(r"0[fdFD][0-9A-Fa-f]{8,16}$", text):
        return Number(int(text[2:], 16))
    if re.match(r"-?\d", text):
        return Number(int(text.rstrip("U"), 0))
    if re.match(r"[\w$]+$", text):
        return Symbol(text)
    raise Fault(f"operand {text}")


def _part(text: str, scope: _Scope) -> Register | Number | None:
    return None if text == "_" else _operand(text, scope)
