"""Compile the Triton kernels at server start, so that no request waits for the compiler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vllm_tokenselect.gpu.attention import RowAttention
from vllm_tokenselect.gpu.rows import graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests


def compile_gpu_kernels(
    workspace: Workspace,
    attention: RowAttention,
    cache: LayerCache,
    block_table_width: int,
    dtype: torch.dtype,
) -> None:
    """Run a layer on one block of keys, for every kind of row that a server will see.

    Args:
        workspace, attention: of the layer.
        cache: of the layer's layout and dtype, with one block at least, and with selections where the
            layer has them; what lies in it does not matter.
        block_table_width: of the server's block tables, whose strides are compiled in.
        dtype: of the queries.
    """
    limits, method = workspace.limits, workspace.limits.method
    device = cache.pages.device
    longest = limits.max_model_len
    tail = min(method.tail_queries, 4)
    first_selecting = method.attended_before + 1
    chunk = max(longest - 2, 0) // method.query_chunk * method.query_chunk
    prompts = {  # first position, end, and how many of the last queries are of the tail
        (0, min(method.query_chunk, longest), tail),  # dense
        # A few queries of a tail, which share a tile, over few candidates.
        (min(first_selecting, longest - 1), min(first_selecting + 2, longest), tail),
        (max(longest - method.query_chunk, 0), longest, tail),  # a chunk and a tail
        (chunk, min(chunk + 2, longest), 0),  # a chunk alone
        (longest - 1, longest, tail),  # decoding
        (0, min(2, longest), tail),  # a row of few queries
    }
    roles = [cache]
    if method.shares_selections:
        roles.append(replace(cache, selections=None, follows=True))
    block_table = torch.zeros((1, block_table_width), dtype=torch.int32, device=device)
    for first, end, tail_len in prompts:
        length = end - first
        seq_lens = np.array([end], np.int32)
        plan = SelectionPlan.build(
            np.array([0, length], np.int32),
            seq_lens,
            BatchRequests.without_seats(
                np.array([end - tail_len + method.tail_queries], np.int32), method.top_k
            ),
            method,
        )
        device_lens = torch.from_numpy(seq_lens).to(device)
        if length == 1:
            buffers = RowBuffers(1, device)
            groups = graph_rows(plan, seq_lens, device_lens, limits, buffers, 1, 1)
        else:
            groups = step_rows(plan, seq_lens, device_lens, limits)
        head_size = cache.pages.shape[-1]
        query = torch.zeros((length, limits.num_heads, head_size), dtype=dtype, device=device)
        steps = [GpuStep(groups, block_table)]
        if method.reuses_selections and length == 1:
            # A request with several generated tokens in a step finishes its rows by a kernel of its own.
            chained = [replace(group, single_rows=False) for group in groups]
            steps.append(GpuStep(chained, block_table))
        for step in steps:
            for each in roles:
                step.run_layer(query, each, 1.0, workspace, attention, torch.empty_like(query))
