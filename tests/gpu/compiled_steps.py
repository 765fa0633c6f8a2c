"""Steps of a server, compiled for a GPU that is not here: run by `test_warmup.py`, in a process alone.

Prints how many kernels the warm-up compiled, and the names of those that a later step added.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from tests.kernels_gpu.compile_ahead import compiling_for
from vllm_tokenselect.gpu.attention import LayerCache
from vllm_tokenselect.gpu.rows import RowBuffers, StepLimits, graph_rows, step_rows
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.warmup import compile_gpu_kernels
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.method import Method
from vllm_tokenselect.plan import SelectionPlan
from vllm_tokenselect.requests import BatchRequests

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, MAX_LEN = 28, 4, 128, 16, 131072
CPU = torch.device("cpu")
# Requests of (first position, end, prompt length): prompts, tails, decoding, and all of them together.
STEPS = [
    [(0, 100, 100)],
    [(0, 4096, 9000)],
    [(65536, 73728, 131000), (9000, 9001, 20)],
    [(130000, 130100, 130100), (8191, 8192, 50), (3, 40, 40), (70001, 70002, 9)],
    [(40960, 41472, 50000), (81920, 82944, 90000), (512, 2048, 7000)],
]
DECODING = [[5], [70000], [131071, 3], [100 + 4099 * i for i in range(31)], [9000] * 256]


def attention(*arguments: object) -> None:
    """A library's, which compiles nothing here."""


def run_steps(workspace: Workspace, cache: LayerCache) -> None:
    limits = workspace.limits
    for requests in STEPS:
        lens = [end - first for first, end, _ in requests]
        ends = np.array([end for _, end, _ in requests], np.int32)
        plan = SelectionPlan.build(
            np.cumsum([0, *lens]).astype(np.int32),
            ends,
            BatchRequests.without_slots(
                np.array([prompt for _, _, prompt in requests], np.int32), limits.method.top_k
            ),
            limits.method,
        )
        groups = step_rows(plan, ends, torch.from_numpy(ends), limits)
        run(GpuStep(groups, block_table(len(lens))), sum(lens), workspace, cache)
    buffers = RowBuffers(256, CPU)
    for contexts in DECODING:
        ends = np.array(contexts, np.int32)
        starts = np.arange(len(ends) + 1, dtype=np.int32)
        plan = SelectionPlan.build(
            starts,
            ends,
            BatchRequests.without_slots(np.ones_like(ends), limits.method.top_k),
            limits.method,
        )
        groups = graph_rows(plan, ends, torch.from_numpy(ends), limits, buffers, len(ends), 1)
        run(GpuStep(groups, block_table(len(ends))), len(ends), workspace, cache)


def block_table(requests: int) -> torch.Tensor:
    return torch.zeros((requests, MAX_LEN // BLOCK_SIZE), dtype=torch.int32)


def run(step: GpuStep, tokens: int, workspace: Workspace, cache: LayerCache) -> None:
    qkv = torch.zeros(tokens, HEADS + 2 * KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    query = qkv[:, :HEADS]  # as a model hands it over: a view
    step.run_layer(query, cache, 0.09, workspace, attention, torch.empty_like(query))


def main() -> int:
    limits = StepLimits(Method(), HEADS, KV_HEADS, MAX_LEN, 512 << 20)
    workspace = Workspace(limits, HEAD_SIZE, CPU)
    pages = torch.zeros(2, BLOCK_SIZE, KV_HEADS, 2, HEAD_SIZE, dtype=torch.bfloat16)
    cache = LayerCache(pages.permute(0, 2, 3, 1, 4))
    compiled: list = []
    with compiling_for(90, compiled):
        compile_gpu_kernels(workspace, attention, cache, MAX_LEN // BLOCK_SIZE, torch.bfloat16)
        ready = {kernel.hash for kernel in compiled}
        compiled.clear()
        run_steps(workspace, cache)
    late = {kernel.hash: kernel.metadata.name for kernel in compiled if kernel.hash not in ready}
    print(f"{len(ready)} kernels ready at start; compiled later: {sorted(late.values())}")
    return 1 if late or not ready else 0


if __name__ == "__main__":
    sys.exit(main())
