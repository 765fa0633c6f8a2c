"""The GPU that costs are estimated for, and how a time follows from counts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from math import ceil

from benchmarks.gpu.device import Ceilings

EXPONENTIALS_PER_CYCLE = 16  # of a multiprocessor
# One program on every second multiprocessor is enough to take the memory's whole bandwidth.
BANDWIDTH_SHARE = 2
# From one program's start to the next one's on a multiprocessor, at least.
START_CYCLES = 100


@dataclass(frozen=True)
class Cost:
    """What a kernel does in one launch, counted.

    Attributes:
        hbm_bytes: read from or written to memory.
        l2_bytes: read or written that an earlier kernel of the layer has left in the L2 cache.
        tensor_flops: of matrix products, padded as they are computed; additions count as well.
        exponentials: of all heads.
        cycles: of the slowest program, of work whose steps wait for each other.
        working: programs that do any of it; others find nothing to do, and end. All of them if 0.
    """

    hbm_bytes: float = 0
    l2_bytes: float = 0
    tensor_flops: float = 0
    exponentials: float = 0
    cycles: float = 0
    working: int = 0


def _assumed(value: float, help_text: str) -> float:
    return field(default=value, metadata={"help": help_text})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Gpu:
    """What is assumed of a GPU: an H200, where nothing else is said."""

    copy_tb_s: float = _assumed(4.3, "TB/s that a large copy reaches, read and written")
    l2_tb_s: float = _assumed(7.0, "TB/s out of the L2 cache")
    l2_mb: float = _assumed(50.0, "MB that the L2 cache holds")
    tensor_tflop_s: float = _assumed(790.0, "bf16 TFLOP/s that a large product reaches")
    multiprocessors: float = _assumed(132, "number of multiprocessors")
    clock_ghz: float = _assumed(1.75, "GHz under load")
    launch_us: float = _assumed(2.0, "us from a kernel's last store to the next one's first load")
    efficiency: float = _assumed(0.75, "share of these rates that a kernel reaches")

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings(1e6 * self.copy_tb_s, 1e6 * self.tensor_tflop_s)

    def busy(self, programs: int) -> float:
        """Share of the multiprocessors that work: the last wave of programs leaves some idle."""
        number = int(self.multiprocessors)
        return programs / (ceil(programs / number) * number) if programs else 1.0

    def kernel_us(self, cost: Cost, programs: int) -> float:
        """Estimated time of one launch: its slowest part, as if all others were hidden behind it."""
        busy = self.busy(cost.working or programs)
        moving = self.efficiency * min(1.0, BANDWIDTH_SHARE * busy)
        computing = self.efficiency * busy
        exponentials_per_us = EXPONENTIALS_PER_CYCLE * self.multiprocessors * 1e3 * self.clock_ghz
        return max(
            cost.hbm_bytes / (1e6 * self.copy_tb_s * moving),
            cost.l2_bytes / (1e6 * self.l2_tb_s * moving),
            cost.tensor_flops / (1e6 * self.tensor_tflop_s * computing),
            cost.exponentials / (exponentials_per_us * computing),
            cost.cycles / (1e3 * self.clock_ghz),
            START_CYCLES * programs / self.multiprocessors / (1e3 * self.clock_ghz),
        )


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """An option for each number that is assumed."""
    group = parser.add_argument_group("assumptions")
    for each in fields(Gpu):
        option = f"--{each.name.replace('_', '-')}"
        assumed = f"{each.metadata['help']} (default: %(default)s)"
        group.add_argument(option, type=float, default=each.default, help=assumed)


def gpu_of(args: argparse.Namespace) -> Gpu:
    return Gpu(**{each.name: getattr(args, each.name) for each in fields(Gpu)})
