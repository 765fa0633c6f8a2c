"""What the kernels that attend read, write and compute."""

from __future__ import annotations

from math import ceil

import numpy as np

from benchmarks.gpu_cost.gpu import Cost, Gpu
from benchmarks.gpu_cost.prices import STEP_CYCLES, Price
from benchmarks.gpu_cost.recording import Launch
from benchmarks.gpu_cost.steps import Rows


def flash_prepare(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    return Cost(l2_bytes=4.0 * len(rows.queries), cycles=STEP_CYCLES)


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


def flash_combine(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    query, splits = launch["q"], launch["splits"]
    left = splits * query.numel() if splits > 1 else 0  # fp32, written and read
    return Cost(l2_bytes=2 * 4.0 * left, cycles=STEP_CYCLES)


def attend_split(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    """Every query reads its row's tokens; the last program of a query and KV head adds up all splits."""
    cache, first = launch["kv_cache"], launch["first_query"]
    # Of a row's last query; of those before it a token less each, which is nothing.
    lengths = np.repeat(rows.lengths, rows.queries)[first : first + launch.grid[2]]
    num_kv_heads, head_size, lines = cache.shape[1], launch["HEAD_SIZE"], launch["LINES"]
    units = -(-lengths // launch["SPLIT_TOKENS"])
    sizes = -(-units // launch["MAX_SPLITS"]) * launch["SPLIT_TOKENS"]
    splits = -(-lengths // np.maximum(sizes, 1))
    elements = float(lengths.sum() * num_kv_heads * head_size)
    left = float(splits.sum() * num_kv_heads * launch["GROUP"] * (head_size + 2))  # fp32
    steps = ceil(sizes.max(initial=0) / launch["TOKENS"])
    combining = ceil(splits.max(initial=0) / launch["COMBINED"])
    return Cost(
        hbm_bytes=2 * elements * cache.element_size(),
        l2_bytes=2 * 4 * left,
        tensor_flops=4 * elements * lines,
        cycles=(steps + combining + 2) * STEP_CYCLES,
        working=int(splits.sum()) * num_kv_heads,
    )


PRICES: dict[str, Price] = {
    "flash_prepare": flash_prepare,
    "flash_forward": flash_forward,
    "flash_combine": flash_combine,
    "attend_split": attend_split,
}
