"""What every kernel costs that a layer may launch.

A kernel that is missing here is an error: the model cannot fall behind the layer.
"""

from __future__ import annotations

from benchmarks.gpu_cost import attending, selecting
from benchmarks.gpu_cost.gpu import Cost, Gpu
from benchmarks.gpu_cost.prices import Price
from benchmarks.gpu_cost.recording import Launch
from benchmarks.gpu_cost.steps import Rows

PRICES: dict[str, Price] = selecting.PRICES | attending.PRICES


class UnknownKernel(KeyError):
    """A kernel whose cost nobody has told."""


def cost_of(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    """What a launch does for the rows of its group.

    Raises:
        UnknownKernel: for a kernel that has no price here.
    """
    if launch.kernel not in PRICES:
        raise UnknownKernel(f"{launch.kernel}: add it to selecting.py or attending.py")
    return PRICES[launch.kernel](launch, rows, gpu)
