"""Runs the programs of a launch: warp by warp, in an order that a seed decides.

A few programs are under way at a time. A warp runs until a barrier, or up to its next atomic access to
global memory or fence; there it gets a new rank by chance, and of all that are under way the highest one
goes on. So one may rest for long while all others go on. Asynchronous copies are done when they are issued,
or not before they are waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from random import Random
from typing import NoReturn

import numpy as np

from tests.emulator.instructions import BARRIER
from tests.emulator.lanes import LANES, NUM_LANES, TYPES, Lanes, spread
from tests.emulator.memory import Fault, Memory
from tests.emulator.shared import SharedBytes, SharedMemory
from tests.emulator.translate import Kernel

MOST_PROGRAMS = 4  # under way at a time


@dataclass(frozen=True)
class Launch:
    """A kernel's programs, and what they share.

    Args:
        arguments: the bits of each parameter.
        shared_bytes: of a program.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[int, ...]
    memory: Memory
    shared_bytes: int

    @cached_property
    def parameters(self) -> dict[str, Lanes]:
        """What `ld.param` reads, by name."""
        declared = self.kernel.entry.parameters
        return {
            name: spread(value % (1 << bits), TYPES[f"u{bits}"])
            for (name, bits), value in zip(declared, self.arguments, strict=True)
        }


@dataclass(frozen=True)
class Copy:
    """`cp.async`: `size` bytes in each lane, of which the first `read` are read; the others are zero."""

    mask: Lanes
    target: Lanes
    source: Lanes
    size: int
    read: Lanes


class Warp:
    """What a warp sees, and the copies that it has under way.

    Args:
        number: of the warp in its program.
        program: its place in the grid.
        delays: copies are done when they are waited for.
    """

    def __init__(
        self,
        number: int,
        launch: Launch,
        program: tuple[int, int, int],
        shared: SharedBytes,
        delays: bool,
    ) -> None:
        self.thread = LANES + np.uint32(NUM_LANES * number)
        self.threads = spread(launch.kernel.entry.threads, np.uint32)
        self.program = [spread(each, np.uint32) for each in program]
        self.programs = [spread(each, np.uint32) for each in launch.grid]
        self.parameters = launch.parameters
        self.memory = launch.memory
        self.shared = SharedMemory(shared, number)
        self._delays = delays
        self._copies: list[Copy] = []
        self._groups: list[list[Copy]] = []

    def copy(
        self, mask: Lanes, target: Lanes, source: Lanes, size: int, read: Lanes | None = None
    ) -> None:
        read = np.broadcast_to(size if read is None else read, NUM_LANES)
        copy = Copy(mask, target, source, int(size), read)
        if self._delays:
            self._copies.append(copy)
        else:
            self._do(copy)

    def commit_copies(self) -> None:
        self._groups.append(self._copies)
        self._copies = []

    def wait_for_copies(self, groups: int) -> None:
        """Until no more than the last `groups` are under way."""
        while len(self._groups) > groups:
            for copy in self._groups.pop(0):
                self._do(copy)

    def _do(self, copy: Copy) -> None:
        reads = copy.mask & (copy.read == copy.size)
        if (copy.mask & ~reads & (copy.read != 0)).any():
            raise Fault("a copy that reads a part of its bytes is not modelled")
        dtype = TYPES["u32" if copy.size == 4 else "u64"]
        count = copy.size // dtype.itemsize
        values = self.memory.load(copy.source, reads, dtype, count)
        self.shared.store(copy.target, copy.mask, dtype, values)


@dataclass(order=True)
class Resting:
    """A warp between two pauses."""

    rank: float
    number: int
    rest: Iterator[str] = field(compare=False)


class Program:
    """The warps of a program, and which of them wait at a barrier."""

    def __init__(self, launch: Launch, place: tuple[int, int, int], order: Random) -> None:
        self.launch = launch
        self.place = place
        self._shared = SharedBytes(launch.shared_bytes)
        self._ready: list[Resting] = []
        self._waiting: list[Resting] = []
        self._has_ended = False
        delays = order.random() < 0.5
        for number in range(launch.kernel.entry.threads // NUM_LANES):
            warp = Warp(number, launch, place, self._shared, delays)
            self._ready.append(Resting(order.random(), number, launch.kernel.run_warp(warp)))

    @property
    def rank(self) -> float:
        """That of the warp that is next."""
        return max(self._ready).rank

    def run_some(self, order: Random) -> bool:
        """Run the warp of the highest rank until it pauses; False if all have ended."""
        warp = max(self._ready)
        try:
            pause = next(warp.rest, None)
        except Exception as error:  # whatever it is, the instruction is what matters
            self._fail(warp.number, f"{type(error).__name__}: {error}", error)
        warp.rank = order.random()
        if pause is None or pause == BARRIER:
            self._ready.remove(warp)
        if pause is None:
            self._has_ended = True
        elif pause == BARRIER:
            self._waiting.append(warp)
        if self._ready:
            return True
        if self._waiting and self._has_ended:
            self._fail(self._waiting[0].number, "waits at a barrier that other warps left behind")
        self._ready, self._waiting = self._waiting, []
        self._shared.pass_barrier()
        return bool(self._ready)

    def _fail(self, warp: int, what: str, error: Exception | None = None) -> NoReturn:
        kernel = self.launch.kernel
        instruction = kernel.instruction_of(error.__traceback__) if error else None
        at = f", line {instruction.line}, `{instruction.text}`" if instruction else ""
        raise Fault(
            f"{kernel.entry.name}, program {self.place}, warp {warp}{at}: {what}"
        ) from error


def run(launch: Launch, order: Random) -> None:
    """Run all programs of a launch.

    Args:
        order: decides which program and warp is next.

    Raises:
        Fault: an access out of bounds or not aligned, warps that meet in shared memory without a barrier or
            leave while others wait at one, lanes of a warp that part, or what is not modelled.
    """
    places = [*product(*(range(size) for size in launch.grid))]
    order.shuffle(places)
    most = order.randint(1, MOST_PROGRAMS)
    programs: list[Program] = []
    with np.errstate(all="ignore"):
        while places or programs:
            while places and len(programs) < most:
                programs.append(Program(launch, places.pop(), order))
            program = max(programs, key=lambda program: program.rank)
            if not program.run_some(order):
                programs.remove(program)
