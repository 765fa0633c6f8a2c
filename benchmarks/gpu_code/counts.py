"""What is counted: launches of a layer, and what the compiler makes of every kernel."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from benchmarks.attention.cases import SHAPES, Work
from benchmarks.gpu_code.sass import count_instructions, disassemble
from benchmarks.gpu_cost.gpu import Gpu
from benchmarks.gpu_cost.steps import ROLES, Case, method_of, record_layer
from tests.kernels_gpu.compile_ahead import compiling_for, launches
from vllm_tokenselect.method.settings import Method

K = 1024
SERVER_LENGTH = 1024 * K
STEPS = ((128 * K, 1), (128 * K, 8), (8 * K, 32))  # contexts and batches of decoding steps


def layers() -> Iterator[dict[str, Any]]:
    """Launches and groups of a layer in captured decoding steps, by what its rows do."""
    multiprocessors = int(Gpu().multiprocessors)
    for shape, (context, batch), role in product(SHAPES, STEPS, ROLES):
        method = method_of(role, Method())
        case = Case(Work(shape, context, batch, 1), role, True, SERVER_LENGTH, method)
        groups = record_layer(case, multiprocessors)
        yield {
            "shape": shape.name,
            "context": context,
            "batch": batch,
            "max_model_len": SERVER_LENGTH,
            "layer": role,
            "launches": sum(len(group.launches) for group in groups),
            "groups": len(groups),
            "kernels": [launch.kernel for launch in groups[0].launches],
        }


def kernels(architecture: int, variants: tuple[str, ...] = ("",)) -> Iterator[dict[str, Any]]:
    """Every kernel in the shapes that are served, compiled; one that two shapes share comes once.

    Args:
        variants: beginnings of the names of those that are compiled.
    """
    seen: set[str] = set()
    for variant, launch in launches(architecture):
        if not variant.startswith(variants):
            continue
        compiled: list[Any] = []
        with compiling_for(architecture, compiled):
            launch()
        for number, kernel in enumerate(compiled):
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            code = disassemble(kernel.asm["cubin"])
            again = sum(other.metadata.name == kernel.metadata.name for other in compiled[:number])
            yield {
                "kernel": kernel.metadata.name,
                "variant": variant + (f", {again + 1}" if again else ""),
                "warps": kernel.metadata.num_warps,
                "registers": code.registers,
                "stack_bytes": code.stack_bytes,
                "shared_bytes": kernel.metadata.shared,
                "instructions": count_instructions(code.sass),
            }
