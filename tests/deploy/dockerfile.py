"""The instructions of the Dockerfile, stage by stage."""

import json
import re
from dataclasses import dataclass

from tests.deploy.tools import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text()


@dataclass(frozen=True)
class Instruction:
    """One instruction: `RUN`, and what stands behind it, on one line."""

    name: str
    value: str


def stages() -> dict[str, list[Instruction]]:
    """Instructions by the stage's name; those before the first `FROM` have the name "".

    Lines that a backslash continues are one instruction, and comments are left out.
    """
    text = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[Instruction]] = {"": []}
    stage = ""
    for line in filter(str.strip, text.splitlines()):
        name, value = line.split(maxsplit=1)
        if name == "FROM":
            stage = value.rpartition(" AS ")[2]
            found[stage] = []
        found[stage].append(Instruction(name, " ".join(value.split())))
    return found


def values(stage: str, name: str) -> list[str]:
    """What stands behind each `name` of a stage, in order."""
    return [instruction.value for instruction in stages()[stage] if instruction.name == name]


def command(stage: str) -> list[str]:
    """What a container of this stage runs when it is given no arguments."""
    return [*json.loads(values(stage, "ENTRYPOINT")[0]), *json.loads(values(stage, "CMD")[0])]


def environment(stage: str) -> dict[str, str]:
    """The variables of a stage."""
    return dict(pair.split("=", 1) for value in values(stage, "ENV") for pair in value.split())
