"""What a compiled kernel consists of: instructions of its machine code, by kind."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# An address, perhaps a predicate, and the instruction's name; what follows are operands and the encoding.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# By the name's first word. What is none of these counts in the total only.
KINDS = {
    "global": {"LDG", "STG", "LD", "ST", "LDGSTS"},
    "shared": {"LDS", "STS", "LDSM", "STSM", "STAS"},
    "local": {"LDL", "STL"},
    "membars": {"MEMBAR"},
    "atomics": {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS"},
    "tensor": {"HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA", "DMMA", "UTCHMMA"},
    "barriers": {"BAR", "SYNCS", "WARPSYNC", "DEPBAR", "LDGDEPBAR"},
    "ballots": {"VOTE", "VOTEU", "MATCH"},
    "shuffles": {"SHFL", "REDUX"},
}


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel as it would run.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread; where registers are spilled, they lie there.
        sass: its instructions as text.
    """

    registers: int
    stack_bytes: int
    sass: str


def disassemble(cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return MachineCode(int(registers), int(stack), sass)


def count_instructions(sass: str) -> dict[str, int]:
    """How many instructions there are: in all, without padding, and of each kind.

    They are counted where they stand, not as often as they run.
    """
    names = Counter(name.split(".")[0] for name in INSTRUCTION.findall(sass))
    del names["NOP"]
    kinds = {kind: sum(names[name] for name in members) for kind, members in KINDS.items()}
    return {"all": sum(names.values()), **kinds}
