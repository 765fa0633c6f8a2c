"""Compile the CPU kernels at server start, so that no request waits for the compiler."""

from __future__ import annotations

import numba
import torch

from vllm_tokenselect.kernels.block_table.cpu import build_sparse_block_table
from vllm_tokenselect.kernels.gather.cpu import gather_tokens
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.score.cpu import score_paged_keys
from vllm_tokenselect.kernels.single_queries.cpu import single_queries
from vllm_tokenselect.kernels.single_queries.rows import SingleQueryRows
from vllm_tokenselect.kernels.vote.cpu import soft_vote
from vllm_tokenselect.kernels.write.cpu import write_tokens


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
    """Run every numba kernel once on tiny inputs of the layer's shape; sets numba's threads.

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
    kv_cache = torch.zeros((1, num_kv_heads, 2, block_size, head_size), dtype=kv_dtype)
    query = torch.zeros((1, num_heads, head_size), dtype=kv_dtype)
    block_table = torch.zeros((1, 1), dtype=torch.int32)
    row_seq = torch.zeros(1, dtype=torch.int32)
    ends = torch.full((1,), block_size, dtype=torch.int32)
    slots = torch.empty((1, block_size), dtype=torch.int32)
    lengths = torch.empty(1, dtype=torch.int32)
    keys = torch.zeros((1, num_kv_heads, head_size), dtype=kv_dtype)
    write_tokens(keys, keys, kv_cache, torch.zeros(1, dtype=torch.int64))
    votes = soft_vote(score_paged_keys(query.float(), kv_cache, block_table, row_seq, 0, ends, 1.0))
    top_k = torch.ones(1, dtype=torch.int32)
    table = (block_table, row_seq, 0, top_k, ends, ends, block_size, slots, lengths)
    build_sparse_block_table(votes, *table)
    gather_tokens(kv_cache, slots[0, :1], keys, torch.empty_like(keys))
    layer = single_queries(SingleQueryRows(row_seq, *table, selects=True, heads=heads))
    layer(query, kv_cache, 1.0, torch.empty_like(query), None, None)
    return numba_threads
