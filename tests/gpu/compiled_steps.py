"""Steps of a server, compiled for a GPU that is not here: run by `test_warmup.py`, in a process alone.

Prints how many kernels the warm-up compiled, and the names of those that a later step added: with and
without the Selection Cache, where layers share selections, and where positions are reassigned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tests.kernels_gpu.compile_ahead import compiling_for
from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention, make_scratch
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.rows import RowGroup, graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.warmup import compile_gpu_kernels
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, MAX_LEN = 28, 4, 128, 16, 131072
MAX_TOKENS, ROTATED = 8704, 64
CPU = torch.device("cpu")
# Requests of (first position, end, prompt length): prompts, tails, decoding, and all of them together.
STEPS = [
    [(0, 100, 100)],
    [(0, 5, 5), (70, 73, 73)],
    [(0, 4096, 9000)],
    [(65536, 73728, 131000), (9000, 9001, 20)],
    [(130000, 130100, 130100), (8191, 8192, 50), (3, 40, 40), (70001, 70002, 9)],
    [(40960, 41472, 50000), (81920, 82944, 90000), (512, 2048, 7000)],
    [(70000, 70005, 50)],  # generated tokens that are computed again
]
DECODING = [[5], [70000], [131071, 3], [100 + 4099 * i for i in range(31)], [9000] * 256]


class Attention:
    """As much of a library's attention as compiles kernels of ours.

    Args:
        buffer: for one that gathers; None for one that reads the cache where it lies.
    """

    name = "absent"
    in_place = True
    buffer_bytes = scratch_bytes = 0

    def __init__(self, buffer: GatherBuffer | None) -> None:
        self.buffer = buffer

    def takes(self, pages: torch.Tensor) -> bool:
        return True

    def parts(self, group: RowGroup) -> Sequence[RowGroup]:
        return (group,)

    def rotates(self, group: RowGroup) -> bool:
        return False

    def __call__(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        group: RowGroup,
        table: SparseBlockTable,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if self.buffer is not None:
            list(self.buffer.gather(cache, table))


def run_steps(workspace: Workspace, attention: RowAttention, cache: LayerCache) -> None:
    limits = workspace.limits
    for requests in STEPS:
        lens = [end - first for first, end, _ in requests]
        ends = np.array([end for _, end, _ in requests], np.int32)
        plan = SelectionPlan.build(
            np.cumsum([0, *lens]).astype(np.int32),
            ends,
            of_requests([prompt for _, _, prompt in requests], limits.method),
            limits.method,
        )
        groups = step_rows(plan, ends, torch.from_numpy(ends), limits)
        step = GpuStep(groups, block_table(len(lens)))
        run(step, sum(lens), workspace, attention, cache)
    buffers = RowBuffers(256, CPU)
    for contexts in DECODING:
        ends = np.array(contexts, np.int32)
        starts = np.arange(len(ends) + 1, dtype=np.int32)
        plan = SelectionPlan.build(
            starts,
            ends,
            of_requests([1] * len(ends), limits.method),
            limits.method,
        )
        groups = graph_rows(plan, ends, torch.from_numpy(ends), limits, buffers, len(ends), 1)
        step = GpuStep(groups, block_table(len(ends)))
        run(step, len(ends), workspace, attention, cache)


def of_requests(prompt_lens: list[int], method: Method) -> BatchRequests:
    """Requests with seats; the first of several selects less than the others, the second nothing."""
    batch = BatchRequests.without_seats(np.array(prompt_lens, np.int32), method.top_k)
    batch.seats[:] = np.arange(len(prompt_lens))
    batch.owners[:] = 1 + batch.seats
    if len(prompt_lens) > 1:
        batch.top_k[0] = method.top_k // 3
        if not method.reassigns_positions:  # which takes no such request
            batch.top_k[1] = FULL_ATTENTION
    return batch


def block_table(requests: int) -> torch.Tensor:
    return torch.zeros((requests, MAX_LEN // BLOCK_SIZE), dtype=torch.int32)


def run(
    step: GpuStep, tokens: int, workspace: Workspace, attention: RowAttention, cache: LayerCache
) -> None:
    qkv = torch.zeros(tokens, HEADS + 2 * KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    query = qkv[:, :HEADS]  # as a model hands it over: a view
    step.run_layer(query, cache, 0.09, workspace, attention, torch.empty_like(query))
    if workspace.limits.method.shares_selections:
        follower = replace(cache, follows=True, selections=None)
        step.run_layer(query, follower, 0.09, workspace, attention, torch.empty_like(query))


def compiled_later(method: Method) -> tuple[int, list[str]]:
    """How many kernels the warm-up compiles, and the names of those that steps add."""
    limits = StepLimits(
        method,
        HEADS,
        KV_HEADS,
        MAX_LEN,
        512 << 20,
        full_attention=not method.reassigns_positions,
        max_tokens=MAX_TOKENS,
        graph_rows=256,
    )
    workspace = Workspace(limits, HEAD_SIZE, CPU, dtype=torch.bfloat16)
    pages = torch.zeros(2, BLOCK_SIZE, KV_HEADS, 2, HEAD_SIZE, dtype=torch.bfloat16)
    selections = None
    if method.reuses_selections:
        selections = SelectionCacheState.allocate(
            256, method.selection_size, HEADS, HEAD_SIZE, torch.bfloat16, CPU
        )
    rotation, buffer = None, None
    if method.reassigns_positions:
        buffer = GatherBuffer(KV_HEADS, HEAD_SIZE, torch.bfloat16, limits.table_width, CPU)
        rotation = Rotation.from_table(
            torch.zeros(MAX_LEN, ROTATED), limits.table_width, method.n_local
        )
    attention = DecodingAttention(Attention(buffer), make_scratch(limits, HEAD_SIZE, CPU))
    cache = LayerCache(pages.permute(0, 2, 3, 1, 4), selections=selections, rotation=rotation)
    compiled: list = []
    with compiling_for(90, compiled):
        compile_gpu_kernels(workspace, attention, cache, MAX_LEN // BLOCK_SIZE, torch.bfloat16)
        ready = {kernel.hash for kernel in compiled}
        compiled.clear()
        run_steps(workspace, attention, cache)
    late = {kernel.hash: kernel.metadata.name for kernel in compiled if kernel.hash not in ready}
    return len(ready), sorted(late.values())


def main() -> int:
    failed = 0
    for method in (
        Method(),
        Method(similarity_threshold=1),
        Method(anchor_layers=4, min_context=5376, top_k=2041),
        Method(positions="reassigned"),
        Method(positions="reassigned", similarity_threshold=1),
    ):
        ready, late = compiled_later(method)
        print(f"{method}: {ready} kernels ready at start; compiled later: {late}")
        failed += bool(late) or not ready
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
