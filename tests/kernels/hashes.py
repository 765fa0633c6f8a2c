"""Print a hash of what each kernel makes of fixed inputs, in fp32.

python -m tests.kernels.hashes
"""

from __future__ import annotations

import hashlib

import numba
import torch

from tests.kernels.cases import (
    SHAPES,
    make_group,
    make_rotation,
    make_softmax,
    paged_cache,
    run_group,
)
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.warmup import compile_cpu_kernels
from vllm_tokenselect.kernels.gather.cpu import gather_tokens
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.score.cpu import score_paged_keys
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.kernels.vote.cpu import soft_vote
from vllm_tokenselect.method.settings import Method

N_INIT, TOP_K = 5, 40


def show(name: str, *outputs: torch.Tensor) -> None:
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(output.contiguous().numpy().tobytes())
    print(name, digest.hexdigest()[:16], flush=True)


def main() -> None:
    torch.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    method = Method(n_init=N_INIT, top_k=TOP_K, similarity_threshold=0.5, refresh_interval=4)
    for case in (SHAPES[6], SHAPES[7]):
        generator = torch.Generator().manual_seed(1)
        compile_cpu_kernels(
            case.torch_dtype, case.head_size, case.num_heads, case.num_kv_heads, case.block_size
        )
        kv_cache, block_table = paged_cache(case)
        shape = (case.rows, case.num_heads, case.head_size)
        query = torch.randn(shape, generator=generator)
        row_seq = torch.arange(case.rows, dtype=torch.int32)
        ends = torch.full((case.rows,), case.tokens - 2, dtype=torch.int32)
        logits = score_paged_keys(query, kv_cache, block_table, row_seq, N_INIT, ends, 0.2)
        show(f"{case} score", logits)
        votes = soft_vote(logits)
        show(f"{case} vote", votes)
        rotation = make_rotation(case)
        top_k = torch.full((case.rows,), TOP_K, dtype=torch.int32)
        keys = torch.zeros((TOP_K, case.num_kv_heads, case.head_size))
        values = torch.zeros_like(keys)
        slots = torch.arange(case.rows * case.tokens, dtype=torch.int32).view(case.rows, -1)
        lengths = torch.full((case.rows,), case.tokens - 3, dtype=torch.int32)
        gather_tokens(kv_cache, slots[0, :TOP_K], keys, values, rotation.cos_sin)
        show(f"{case} gather", keys, values)
        state = SelectionCacheState.allocate(
            case.rows, N_INIT + TOP_K, *shape[1:], torch.float32, torch.device("cpu")
        )
        counters = torch.zeros(len(Counter), dtype=torch.int64)
        rows = (row_seq, row_seq, top_k, ends, slots, lengths)
        for turned in (None, rotation):
            for selects in (False, True):
                out = torch.zeros_like(query)
                cache = LayerCache(kv_cache, rotation=turned)
                run_group(make_group(*rows, selects), query, cache, block_table, method, out)
                show(f"{case} {'selects' if selects else 'attends'} {turned is not None}", out)
        out = torch.zeros_like(query)
        cache = LayerCache(kv_cache, **make_softmax(case, "sinks and a cap"))
        run_group(make_group(*rows, False), query, cache, block_table, method, out)
        show(f"{case} attends with sinks and a cap", out)
        caching = {"caches": torch.ones(case.rows).bool(), "seat": row_seq, "owner": row_seq + 1}
        cache = LayerCache(kv_cache, selections=state)
        for step in range(4):
            query += torch.randn(shape, generator=generator) * 0.4
            group = make_group(*rows, **caching)
            run_group(group, query, cache, block_table, method, out, counters=counters)
            show(f"{case} reuses, step {step}", out, counters)


if __name__ == "__main__":
    main()
