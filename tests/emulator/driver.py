"""Stands in the place of Triton's driver for GPUs: what is launched runs in the emulator."""

from __future__ import annotations

import ctypes
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from tests.emulator.memory import Buffer, Memory
from tests.emulator.run import Launch, run
from tests.emulator.translate import Kernel, translate
from tests.kernels_gpu.compile_ahead import SHARED_MEMORY, AbsentGpu

ARCHITECTURE = 90
PAGE = 4096  # bytes; an address within a page stays what it is
BUFFER_SPACE = 1 << 44  # bytes from one buffer to the next: no wrong offset reaches another


@dataclass
class Tally:
    """What was launched of one kernel."""

    launches: int = 0
    programs: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Loaded:
    """A kernel as it was compiled."""

    name: str
    ptx: str
    shared_bytes: int
    kernel: Kernel


class EmulatedGpu(AbsentGpu):
    """A driver of Triton's.

    Args:
        seed: of the order in which programs and warps run.
    """

    def __init__(self, seed: int | str = 0) -> None:
        super().__init__(ARCHITECTURE)
        self.order = Random(seed)
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.utils = self  # Triton asks them separately
        self._edit: Callable[[str, str], str] | None = None

    def install(self) -> None:
        """Make it Triton's driver, and spare the assembler its work: it gives what it got."""
        CUDABackend.make_cubin = lambda backend, source, *_: source.encode()
        triton.runtime.driver.set_active(self)

    @contextmanager
    def editing(self, edit: Callable[[str, str], str], seed: int = 0) -> Iterator[None]:
        """Within it a kernel's PTX is what `edit` makes of its name and PTX, and the order the seed's."""
        before = self._edit, self.order
        self._edit, self.order = edit, Random(seed)
        try:
            yield
        finally:
            self._edit, self.order = before

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[ARCHITECTURE], "multiprocessor_count": 132}

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, device: int
    ) -> tuple[Loaded, Loaded, int, int, int]:
        """Returns: the module and the function, registers, spills, most threads."""
        ptx = binary.decode()
        loaded = Loaded(name, ptx, shared_bytes, translate(ptx, name))
        return loaded, loaded, 0, 0, 1024

    def unload_module(self, module: Loaded) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A function that Triton calls with the grid, the function and all arguments."""
        signature: Mapping[str, str] = source.signature

        def launch(*given: Any) -> None:
            grid, function = given[:3], given[4]
            arguments = given[-len(signature) :]
            kinds = {
                name: (kind, value)
                for (name, kind), value in zip(signature.items(), arguments, strict=True)
                if kind != "constexpr"
            }
            self._launch(function, grid, kinds)

        return launch

    def _launch(
        self, loaded: Loaded, grid: tuple[int, int, int], arguments: dict[str, tuple[str, Any]]
    ) -> None:
        kernel = loaded.kernel
        if self._edit:
            text = self._edit(loaded.name, loaded.ptx)
            kernel = kernel if text == loaded.ptx else translate(text, loaded.name)
        spaces = _Spaces()
        bits = [spaces.bits(name, kind, value) for name, (kind, value) in arguments.items()]
        # Behind the arguments come the addresses of scratch memory that no kernel here has.
        bits += [0] * (len(kernel.entry.parameters) - len(bits))
        started = time.perf_counter()
        memory = Memory([*spaces.buffers.values()])
        run(Launch(kernel, grid, tuple(bits), memory, loaded.shared_bytes), self.order)
        tally = self.tallies[loaded.name]
        tally.launches += 1
        tally.programs += grid[0] * grid[1] * grid[2]
        tally.seconds += time.perf_counter() - started


class _Spaces:
    """Gives the memory of tensors addresses far from each other."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}

    def bits(self, name: str, kind: str, value: Any) -> int:
        """An argument as a kernel gets it."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in self.buffers:
                self.buffers[storage.data_ptr()] = self._buffer(name, storage)
            buffer = self.buffers[storage.data_ptr()]
            return buffer.address + value.data_ptr() - storage.data_ptr()
        if kind in ("fp32", "f32"):
            return int.from_bytes(struct.pack("<f", value), "little")
        return int(value)

    def _buffer(self, name: str, storage: torch.UntypedStorage) -> Buffer:
        address = (len(self.buffers) + 1) * BUFFER_SPACE + storage.data_ptr() % PAGE
        data = np.zeros(0, np.uint8)
        if storage.nbytes():
            memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
            data = np.ctypeslib.as_array(memory)
        return Buffer(name, address, data)
