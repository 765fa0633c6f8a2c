"""What the prices of kernels have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import ceil

import numpy as np
import torch

from benchmarks.gpu_cost.gpu import Cost, Gpu
from benchmarks.gpu_cost.recording import Launch
from benchmarks.gpu_cost.steps import Rows
from vllm_tokenselect.method.plan import Int64

# Cycles of a step of a program that loads, computes and goes on: the L2 cache's latency and a barrier.
STEP_CYCLES = 700
# Pairs of a vote and a bin that a program's histogram compares in a cycle. Triton 3.6 asks every warp for a
# ballot for each bit of a digit and each 32 bins: read from its compiled code. Newer releases are faster.
HISTOGRAM_PAIRS_PER_CYCLE = 512
INT32 = 4

Price = Callable[[Launch, Rows, Gpu], Cost]


def values(tensor: torch.Tensor) -> Int64:
    """Of an array of rows, which has its values."""
    return tensor.numpy().astype(np.int64)


def stored(num_bytes: float, gpu: Gpu, **others: float) -> Cost:
    """Bytes of the workspace, written or read once: they stay in the L2 cache if they fit."""
    if num_bytes > 1e6 * gpu.l2_mb:
        return Cost(hbm_bytes=num_bytes, **others)
    return Cost(l2_bytes=num_bytes, **others)


def steps_of(tokens: int, launch: Launch) -> int:
    """Steps of the slowest of the programs that share a row's tokens, the first axis of the grid."""
    return ceil(ceil(tokens / launch["TOKENS"]) / launch.grid[0])


def working_on(tokens: Int64, launch: Launch) -> int:
    """Programs that have some of their row's tokens."""
    steps = -(-tokens // launch["TOKENS"])
    return int(steps.clip(max=launch.grid[0]).sum())


def added(*costs: Cost) -> Cost:
    """What one kernel does in turn."""
    names = (each.name for each in fields(Cost))
    sums = {name: sum(getattr(cost, name) for cost in costs) for name in names}
    return Cost(**sums | {"working": max(cost.working for cost in costs)})


def histogram_cycles(votes: int, bits: int) -> float:
    """Cycles in which a program counts how often each digit of so many bits occurs."""
    return (votes << bits) / HISTOGRAM_PAIRS_PER_CYCLE
