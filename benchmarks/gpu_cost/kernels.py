"""What every kernel reads, writes and computes, as a function of what it was launched with.

A kernel that is missing here is an error: the model cannot fall behind the layer.
"""

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
PRICES: dict[str, Price] = {}


class UnknownKernel(KeyError):
    """A kernel whose cost nobody has told."""


def cost_of(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    """What a launch does for the rows of its group.

    Raises:
        UnknownKernel: for a kernel that has no price here.
    """
    if launch.kernel not in PRICES:
        raise UnknownKernel(f"{launch.kernel}: add it to benchmarks/gpu_cost/kernels.py")
    return PRICES[launch.kernel](launch, rows, gpu)


def price(name: str) -> Callable[[Price], Price]:
    def register(function: Price) -> Price:
        PRICES[name] = function
        return function

    return register


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


@price("_decide")
def decide(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    heads = launch["KV_HEADS"] * launch["GROUP_SIZE"]
    own, last = launch["query"].element_size(), launch["state_query"].element_size()
    return Cost(l2_bytes=launch.grid[0] * heads * (own + last), cycles=3 * STEP_CYCLES)


@price("_mean_queries")
def mean_queries(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    out = launch["out"]
    num_heads, head_size = out.shape[1:]
    read = rows.queries.sum() * launch["query"].element_size()
    written = len(rows.queries) * out.element_size()
    steps = ceil(rows.queries.max() / launch["TOKENS"])
    traffic = float(read + written) * num_heads * head_size
    return Cost(l2_bytes=traffic, cycles=steps * STEP_CYCLES)


def candidates_of(launch: Launch) -> Int64:
    """Of the rows of a pass, int64 [R]."""
    return (values(launch["ends"]) - launch["start"]).clip(min=0)


@price("_score")
def score(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own, cache = candidates_of(launch), launch["kv_cache"]
    tiles = np.array(
        [own[first : first + n].max(initial=0) for _, first, n in values(launch["tiles"])]
    )
    read, num_kv_heads = tiles.sum(), cache.shape[1]
    lines = launch["LINES"] * launch["SPLITS"]
    steps = ceil(tiles.max() / launch["TOKENS"] / launch.grid[1])
    counted = stored(4.0 * own.sum() * launch["num_heads"], gpu)
    keys = float(read * num_kv_heads * launch["HEAD_SIZE"])
    return Cost(
        hbm_bytes=keys * cache.element_size() + counted.hbm_bytes,
        l2_bytes=counted.l2_bytes,
        tensor_flops=2 * keys * lines,
        exponentials=float(own.sum() * launch["num_heads"]),
        cycles=steps * STEP_CYCLES,
        working=launch.programs * np.count_nonzero(tiles) // len(tiles),
    )


@price("_soft_vote")
def soft_vote(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own, heads = candidates_of(launch), launch["HEADS"]
    counted = stored(4.0 * own.sum() * heads, gpu)
    sums = 2 * 4.0 * launch.programs * heads * launch["PARTS"] if own.any() else 0.0
    return Cost(
        hbm_bytes=counted.hbm_bytes,
        l2_bytes=counted.l2_bytes + sums + 4.0 * own.sum(),
        exponentials=float(own.sum() * heads),
        cycles=steps_of(own.max(initial=0), launch) * STEP_CYCLES,
        working=working_on(own, launch),
    )


@price("aten::zero_")
def zero(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    return Cost(l2_bytes=float(launch["out"].nbytes))


def selecting(launch: Launch) -> Int64:
    """Candidates of the rows that select, 0 of others, int64 [R]."""
    candidates = values(launch["candidate_ends"]) - launch["n_init"]
    return np.where(candidates > values(launch["top_k"]), candidates, 0)


def votes_cost(launch: Launch, own: Int64, histogram_bits: int, gpu: Gpu) -> Cost:
    """Of one reading of the votes, with a histogram of digits of so many bits; 0 for none."""
    steps = steps_of(own.max(initial=0), launch)
    pairs = steps * launch["TOKENS"] << histogram_bits if histogram_bits else 0
    cycles = steps * STEP_CYCLES + pairs / HISTOGRAM_PAIRS_PER_CYCLE
    working = working_on(own, launch)
    return stored(4.0 * own.sum(), gpu, cycles=cycles, working=working)


def written_cost(launch: Launch, rows: Rows) -> Cost:
    """Of the lines of the table, but for rows that reuse: their context ends at 0."""
    writes = values(launch["context_ends"]) > 0
    tokens = np.where(writes, rows.lengths, 0)
    longest = tokens.max(initial=0) if not selecting(launch).any() else 0
    # A block number is read, a slot written, for each.
    traffic = 2.0 * INT32 * tokens.sum()
    steps, working = steps_of(longest, launch), working_on(tokens, launch)
    return Cost(l2_bytes=traffic, cycles=steps * STEP_CYCLES, working=working)


def added(*costs: Cost) -> Cost:
    """What one kernel does in turn."""
    names = (each.name for each in fields(Cost))
    sums = {name: sum(getattr(cost, name) for cost in costs) for name in names}
    return Cost(**sums | {"working": max(cost.working for cost in costs)})


@price("_build")
def build(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own, bits = selecting(launch), (launch["BITS_0"], launch["BITS_1"], 0)
    return added(*(votes_cost(launch, own, each, gpu) for each in bits), written_cost(launch, rows))


@price("_count_digit")
def count_digit(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    bits = launch["BITS_1"] if launch["DIGIT"] else launch["BITS_0"]
    return votes_cost(launch, selecting(launch), bits, gpu)


@price("_count_kept")
def count_kept(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    return votes_cost(launch, selecting(launch), 0, gpu)


@price("_write_parts")
def write_parts(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own = selecting(launch)
    return added(votes_cost(launch, own, 0, gpu), written_cost(launch, rows))


@price("_finish")
def finish(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    chains = launch.grid[1] - 1
    # The stored selection is read, and the line or the selection written.
    traffic = 2.0 * INT32 * chains * launch["selected_stride"]
    return Cost(l2_bytes=traffic, cycles=3 * STEP_CYCLES)


@price("flash_prepare")
def flash_prepare(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    return Cost(l2_bytes=4.0 * len(rows.queries), cycles=STEP_CYCLES)


@price("flash_forward")
def flash_forward(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    query, keys = launch["q"], launch["k"]
    num_heads, head_size = query.shape[1:]
    num_kv_heads, group = keys.shape[2], num_heads // keys.shape[2]
    moved = 2.0 * rows.lengths.sum() * num_kv_heads * head_size * keys.element_size()
    lines = rows.queries * group
    # A tile has 64 lines at least; half of what lies on the diagonal is left out.
    seen = np.maximum(lines, 64) * rows.lengths - lines * (rows.queries - 1) // 2
    flops = 4.0 * seen.sum() * num_kv_heads * head_size
    return Cost(hbm_bytes=moved, tensor_flops=flops, cycles=3 * STEP_CYCLES)


@price("flash_combine")
def flash_combine(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    query, splits = launch["q"], launch["splits"]
    left = splits * query.numel() if splits > 1 else 0  # fp32, written and read
    return Cost(l2_bytes=2 * 4.0 * left, cycles=STEP_CYCLES)
