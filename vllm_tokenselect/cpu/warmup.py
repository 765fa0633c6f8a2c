"""Compile the CPU kernels at server start, so that no request waits for the compiler."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.attention import GatheredAttention
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.write.cpu import write_tokens
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method


def use_torch_threads() -> int:
    """Give numba as many threads as PyTorch has; call it in the thread that runs the kernels.

    Returns:
        the number that numba has got. numba cannot have more than it counted cores when it was
        imported (`numba.config.NUMBA_NUM_THREADS`), and it counts those of the importing thread,
        which a server may have bound to one: set NUMBA_NUM_THREADS before.

    Raises:
        RuntimeError: the OpenMP library that numba's threads need is missing.
    """
    threads = torch.get_num_threads()
    numba_threads: int = min(threads, numba.config.NUMBA_NUM_THREADS)
    try:
        numba.set_num_threads(numba_threads)
    except ValueError as error:  # numba's own words: "No threading layer could be loaded"
        raise RuntimeError(
            "numba found no OpenMP library (libgomp.so.1), which TOKENSELECT's CPU kernels run on; "
            "install it (package libgomp1 on Debian and Ubuntu, libgomp on Fedora)"
        ) from error
    # At its start numba tells OpenMP its own number of threads, and PyTorch would follow. Not
    # torch.set_num_threads: vLLM replaces it in its workers by a function that does nothing.
    torch._C.set_num_threads(threads)
    return numba_threads


def compile_cpu_kernels(
    kv_dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    heads: HeadGroup | None = None,
) -> int:
    """Run a layer on one block of keys, for every kind of row; sets numba's threads.

    About 15 s the first time on a machine, well under a second from numba's cache afterwards.

    Args:
        kv_dtype: fp32, bf16 or fp16, the cache's dtype.
        head_size, num_heads, num_kv_heads, block_size: of the layer.
        heads: the processes whose heads vote together, which all call this.

    Returns:
        the number of numba's threads, as `use_torch_threads` does.

    Raises:
        RuntimeError: the OpenMP library that numba's threads need is missing.
    """
    numba_threads = use_torch_threads()
    method = Method(top_k=1, n_init=0, n_local=1, query_chunk=block_size, tail_queries=0)
    plan = SelectionPlan.build(
        np.array([0, 1, 3, 4], np.int32),
        # The first request selects with one query. The second's prompt goes on, so its two queries are a
        # row. The third sees its whole context.
        np.array([block_size, block_size, 1], np.int32),
        BatchRequests.without_seats(np.array([1, 2 * block_size, 1], np.int32), method.top_k),
        method,
    )
    block_table, counters = torch.zeros((3, 1), dtype=torch.int32), torch.zeros(len(Counter)).long()
    step = CpuStep.of_plan(plan, block_table, block_size, num_heads, method, counters, heads=heads)
    pages = torch.zeros((1, num_kv_heads, 2, block_size, head_size), dtype=kv_dtype)
    tokens = torch.zeros((4, num_kv_heads, head_size), dtype=kv_dtype)
    write_tokens(tokens, tokens, pages, torch.arange(4))
    query = torch.zeros((4, num_heads, head_size), dtype=kv_dtype)
    attention = GatheredAttention(_attend_nothing, num_kv_heads, head_size, kv_dtype, block_size)
    step.run_layer(query, LayerCache(pages), 1.0, attention, torch.empty_like(query))
    return numba_threads


def _attend_nothing(*_: Any, **__: Any) -> None:
    """In place of a library, which has nothing to compile."""
