"""Milliseconds of each CPU operation in one decoding step of one layer, beside vLLM's CPU_ATTN.

    python -m benchmarks.kernels [--threads 1] [--contexts 8192 32768] [--repeats 21]

The operations take turns over several layers' caches, as a model does, so that no context is served from
the processor's cache. The median of the turns is printed. CPU_ATTN is left out where vLLM is missing. The
question is what each operation takes alone, so their order is known here a second time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.rows import step_rows
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.cpu.warmup import compile_cpu_kernels
from vllm_tokenselect.kernels.block_table.cpu import build_sparse_block_table
from vllm_tokenselect.kernels.gather.cpu import gather_tokens
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.score.cpu import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.kernels.vote.cpu import soft_vote
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method

try:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
except ImportError:
    ops = None

SHAPES = [(9, 3, 64), (28, 4, 128)]  # query heads, KV heads, head size
N_INIT, N_LOCAL, TOP_K, BLOCK_SIZE = 128, 512, 2048, 32
CACHES_BYTES = 384 << 20  # of all layers together; far more than a processor's cache


def cpu_attn_decode(
    query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, context: int
) -> Callable[[], None] | None:
    """vLLM's decoding attention over the whole context; None where vLLM is missing.

    The cache is used as it lies: the op's packed layout has the same size, and time does not depend
    on the numbers.
    """
    if ops is None:
        return None
    num_heads, head_size = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    isa = _get_attn_isa(query.dtype, BLOCK_SIZE, head_size, "auto")
    starts = torch.tensor([0, 1], dtype=torch.int32)
    lengths = torch.tensor([context], dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        1, num_heads, num_kv_heads, head_size, lengths, query.dtype, starts, True, -1, isa, True
    )
    out = torch.empty_like(query)
    keys, values = (part.contiguous() for part in kv_cache.unbind(dim=2))

    def decode() -> None:
        ops.cpu_attention_with_kv_cache(
            query,
            keys,
            values,
            out,
            starts,
            lengths,
            head_size**-0.5,
            True,
            None,
            -1,
            block_table,
            0.0,
            schedule,
            None,
        )

    return decode


def contenders(
    num_heads: int, num_kv_heads: int, head_size: int, context: int
) -> dict[str, list[Callable[[], object]]]:
    """For every operation one call a layer."""
    num_blocks = context // BLOCK_SIZE + 8
    shape = (num_blocks, num_kv_heads, 2, BLOCK_SIZE, head_size)
    cache_bytes = 2 * torch.Size(shape).numel()
    block_table = torch.randperm(num_blocks)[: context // BLOCK_SIZE].to(torch.int32)[None]
    method = Method(
        top_k=TOP_K,
        n_init=N_INIT,
        n_local=N_LOCAL,
        similarity_threshold=-2.0,  # whatever the query, a selection is reused
        refresh_interval=0,
    )
    requests = BatchRequests(*(np.array([x], np.int32) for x in (0, 1, context - 1, TOP_K)))
    starts, ends = np.array([0, 1], np.int32), np.array([context], np.int32)
    plan = SelectionPlan.build(starts, ends, requests, method)
    (group,) = step_rows(plan, block_table, BLOCK_SIZE, num_heads, method, 1 << 30)
    row_seq, top_k, candidate_end, context_end, slots, lengths = map(
        torch.from_numpy,
        (
            group.row_seq,
            group.top_k,
            group.candidate_end,
            group.context_end,
            group.slots,
            group.lengths,
        ),
    )
    query = torch.randn(1, num_heads, head_size).bfloat16()
    mean_query, out, scale = query.float(), torch.empty_like(query), head_size**-0.5
    calls: dict[str, list[Callable[[], object]]] = defaultdict(list)
    rows = (block_table, row_seq, N_INIT, top_k, candidate_end, context_end, BLOCK_SIZE)
    everything = SelectionPlan.build(starts, ends, requests, replace(method, min_context=context))
    (full,) = step_rows(everything, block_table, BLOCK_SIZE, num_heads, method, 1 << 30)
    attend_only, whole, reusing, dense = (
        CpuStep(
            [rows],
            block_table,
            BLOCK_SIZE,
            method,
            torch.zeros(len(Counter), dtype=torch.int64),
        ).run_layer
        for rows in (
            group._replace(selects=False, caches=np.array([False])),
            group._replace(caches=np.array([False])),
            group,
            full,
        )
    )
    for _ in range(max(2, CACHES_BYTES // cache_bytes)):
        kv_cache = torch.randn(shape, dtype=torch.bfloat16)
        scoring = (mean_query, kv_cache, block_table, row_seq, N_INIT, candidate_end, scale)
        logits = score_paged_keys(*scoring)
        table = (soft_vote(logits), *rows, slots, lengths)
        build_sparse_block_table(*table)
        gathered = torch.zeros((2, slots.shape[1], num_kv_heads, head_size), dtype=torch.bfloat16)
        state = SelectionCacheState.allocate(
            1, N_INIT + TOP_K, num_heads, head_size, torch.bfloat16, torch.device("cpu")
        )
        layer, caching = LayerCache(kv_cache), LayerCache(kv_cache, selections=state)
        own: dict[str, Callable[[], object]] = {
            "score": partial(score_paged_keys, *scoring),
            "vote": partial(soft_vote, logits),
            "block_table": partial(build_sparse_block_table, *table),
            "attend": partial(attend_only, query, layer, scale, None, out),
            "reselect": partial(whole, query, layer, scale, None, out),
            "reuse": partial(reusing, query, caching, scale, None, out),
            "dense": partial(dense, query, layer, scale, None, out),
            "gather": partial(gather_tokens, kv_cache, slots[0], *gathered),
        }
        own["reuse"]()  # the first one selects
        if decode := cpu_attn_decode(query, kv_cache, block_table, context):
            own["CPU_ATTN"] = decode
        for name, call in own.items():
            calls[name].append(call)
    return calls


def medians(calls: dict[str, list[Callable[[], object]]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each operation; the operations and the layers take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, layers in calls.items():
            begin = time.perf_counter()
            layers[repeat % len(layers)]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768], help="tokens")
    parser.add_argument("--repeats", type=int, default=21, help="turns of each operation")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)  # after vLLM's import, which sets its own
    for num_heads, num_kv_heads, head_size in SHAPES:
        compile_cpu_kernels(torch.bfloat16, head_size, num_heads, num_kv_heads, BLOCK_SIZE)
        for context in arguments.contexts:
            calls = contenders(num_heads, num_kv_heads, head_size, context)
            times = medians(calls, arguments.repeats)
            line = "  ".join(f"{name} {value:.3f}" for name, value in times.items())
            print(f"H{num_heads}/{num_kv_heads}-D{head_size}-N{context}-bf16  {line}")
            print(
                f"  dense / reselecting {times['dense'] / times['reselect']:.2f}x"
                f"  dense / attending to a selection {times['dense'] / times['attend']:.2f}x"
            )
            if "CPU_ATTN" in times:
                print(
                    f"  CPU_ATTN / reselecting {times['CPU_ATTN'] / times['reselect']:.1f}x"
                    f"  CPU_ATTN / reusing {times['CPU_ATTN'] / times['reuse']:.1f}x"
                )


if __name__ == "__main__":
    main()
