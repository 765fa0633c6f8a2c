"""A few instructions as a kernel of their own."""

from __future__ import annotations

import re
from random import Random

import numpy as np

from tests.emulator.lanes import NUM_LANES
from tests.emulator.memory import Buffer, Memory
from tests.emulator.run import Launch, run
from tests.emulator.translate import translate

HEAD = """.visible .entry snippet(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred 	%p<200>;
	.reg .b16 	%rs<200>;
	.reg .b32 	%r<200>;
	.reg .b64 	%rd<200>;
"""
SPACE = 1 << 32  # bytes from one buffer to the next
BITS = {"p": 1, "rs": 16, "r": 32, "rd": 64}


def run_snippet(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    programs: int = 1,
    shared_bytes: int = 1024,
    seed: int = 0,
) -> None:
    """Run instructions.

    Args:
        body: finds the thread in %r0, the program in %r1, and the address of `arrays[i]` in %rd{i}.
        arrays: read and written in place.
    """
    lines = ["mov.u32 %r0, %tid.x;", "mov.u32 %r1, %ctaid.x;"]
    lines += [f"ld.param.b64 %rd{i}, [snippet_param_{i}];" for i in range(len(arrays))]
    parameters = [f"	.param .u64 snippet_param_{i}" for i in range(len(arrays))]
    head = HEAD.format(parameters=",\n".join(parameters), threads=threads)
    kernel = translate("\n".join([head, *lines, body, "ret;", "}"]), "snippet")
    addresses = [SPACE * (i + 1) for i in range(len(arrays))]
    buffers = [
        Buffer(f"array {i}", address, array.reshape(-1).view(np.uint8))
        for i, (address, array) in enumerate(zip(addresses, arrays, strict=True))
    ]
    launch = Launch(kernel, (programs, 1, 1), tuple(addresses), Memory(buffers), shared_bytes)
    run(launch, Random(seed))


def compute(instruction: str, *sources: list) -> list[np.ndarray]:
    """What one instruction makes of registers.

    Args:
        instruction: reads any registers below 100 and writes any from 100 on.
        sources: values of those that it reads, by their place in the text; a value for each lane, repeated.
            Floats are float32.

    Returns:
        bits [32] of the registers that it writes, by their place; bools of predicates.
    """
    registers = [*dict.fromkeys(re.findall(r"%((?:p|rs|rd|r)\d+)\b", instruction))]
    read = [name for name in registers if _number(name) < 100]
    written = [name for name in registers if _number(name) >= 100]
    arrays = [_bits(values, name) for name, values in zip(read, sources, strict=True)]
    results = [np.zeros(NUM_LANES, _stored(name)) for name in written]
    lines = []
    for i, name in enumerate(read):
        lines += [*_address(i, name), _load(name)]
    lines.append(f"{instruction};")
    for i, name in enumerate(written, len(read)):
        lines += [*_address(i, name), *_store(name)]
    run_snippet("\n".join(lines), *arrays, *results)
    return [
        result.astype(bool) if name.startswith("p") else result
        for name, result in zip(written, results, strict=True)
    ]


def _number(name: str) -> int:
    return int(re.search(r"\d+", name)[0])


def _size(name: str) -> int:
    """Bytes of a register in memory."""
    return max(BITS[name.rstrip("0123456789")], 32 if name.startswith("p") else 0) // 8


def _stored(name: str) -> np.dtype:
    return np.dtype(f"u{_size(name)}")


def _bits(values: list, name: str) -> np.ndarray:
    if any(isinstance(value, float) for value in values):
        values = np.array(values, np.float32).view(np.uint32)
    return np.resize(np.array([int(value) for value in values], np.uint64), NUM_LANES).astype(
        _stored(name)
    )


def _address(argument: int, name: str) -> list[str]:
    return [
        f"ld.param.b64 %rd198, [snippet_param_{argument}];",
        f"mul.wide.u32 %rd199, %r0, {_size(name)};",
        "add.s64 %rd199, %rd199, %rd198;",
    ]


def _load(name: str) -> str:
    if name.startswith("p"):
        return f"ld.global.b32 %r199, [%rd199]; setp.ne.b32 %{name}, %r199, 0;"
    return f"ld.global.b{_size(name) * 8} %{name}, [%rd199];"


def _store(name: str) -> list[str]:
    if name.startswith("p"):
        return [f"selp.b32 %r199, 1, 0, %{name};", "st.global.b32 [%rd199], %r199;"]
    return [f"st.global.b{_size(name) * 8} [%rd199], %{name};"]
