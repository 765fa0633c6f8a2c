"""What the layers did, counted where they run.

Kernels add to one tensor of the process, under CUDA graphs too. Nothing reads it while a step runs but the
thread of `vllm_tokenselect.metrics`, which takes it to the server's `/metrics`.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

import torch

from vllm_tokenselect.device_memory import make_lasting


class Counter(IntEnum):
    """The counters by their places in the tensor.

    The first four count rows of the sparse block table, each row once a layer, by what became of it.
    The others count tokens, summed over queries and layers.
    """

    RESELECTED = 0
    REUSED = 1
    SHARED = 2
    DENSE = 3
    ATTENDED = 4
    CONTEXT = 5


def worker_counters(device: torch.device) -> torch.Tensor:
    """The process's counters on a device: int64 [len(Counter)], ever growing.

    Ask for them before CUDA graphs are captured: the first call makes the tensor, which then stays where
    it is.
    """
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return _counters_on(device)


@cache
def _counters_on(device: torch.device) -> torch.Tensor:
    # Copied from the host: the copy waits until it is there, for whichever stream adds to it first.
    return make_lasting(lambda: torch.zeros(len(Counter), dtype=torch.int64).to(device))
