"""Print a hash of what each kernel makes of fixed inputs, in fp32.

python -m tests.kernels.hashes
"""

from __future__ import annotations

import hashlib

import numba
import torch

from tests.kernels.cases import SHAPES, make_rotation, make_softmax, paged_cache
from vllm_tokenselect.cpu.warmup import compile_cpu_kernels
from vllm_tokenselect.kernels.operations import cpu_operations
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.kernels.single_queries.rows import CachingRows, SingleQueryRows

N_INIT, TOP_K = 5, 40


def show(name: str, *outputs: torch.Tensor) -> None:
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(output.contiguous().numpy().tobytes())
    print(name, digest.hexdigest()[:16], flush=True)


def main() -> None:
    torch.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    operations = cpu_operations()
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
        logits = operations.score_paged_keys(
            query, kv_cache, block_table, row_seq, N_INIT, ends, 0.2
        )
        show(f"{case} score", logits)
        votes = operations.soft_vote(logits)
        show(f"{case} vote", votes)
        rotation = make_rotation(case)
        top_k = torch.full((case.rows,), TOP_K, dtype=torch.int32)
        keys = torch.zeros((TOP_K, case.num_kv_heads, case.head_size))
        values = torch.zeros_like(keys)
        slots = torch.arange(case.rows * case.tokens, dtype=torch.int32).view(case.rows, -1)
        lengths = torch.full((case.rows,), case.tokens - 3, dtype=torch.int32)
        operations.gather_tokens(kv_cache, slots[0, :TOP_K], keys, values, rotation.cos_sin)
        show(f"{case} gather", keys, values)
        state = SelectionCacheState.allocate(
            case.rows, N_INIT + TOP_K, *shape[1:], torch.float32, torch.device("cpu")
        )
        caching = CachingRows(
            caches=torch.ones(case.rows, dtype=torch.bool),
            seat=row_seq,
            owner=row_seq + 1,
            similarity_threshold=0.5,
            refresh_interval=4,
            counts=torch.zeros(5, dtype=torch.int64),
        )
        table = (block_table, row_seq, N_INIT, top_k, ends, ends + 1, case.block_size)
        for turned in (None, rotation):
            for selects in (False, True):
                out = torch.zeros_like(query)
                rows = SingleQueryRows(row_seq, *table, slots, lengths, selects)
                operations.single_queries(rows)(query, kv_cache, 0.2, out, None, turned)
                show(f"{case} {'selects' if selects else 'attends'} {turned is not None}", out)
        out = torch.zeros_like(query)
        rows = SingleQueryRows(row_seq, *table, slots, lengths, False)
        softmax = make_softmax(case, "sinks and a cap")
        operations.single_queries(rows)(query, kv_cache, 0.2, out, None, None, **softmax)
        show(f"{case} attends with sinks and a cap", out)
        for step in range(4):
            query += torch.randn(shape, generator=generator) * 0.4
            rows = SingleQueryRows(row_seq, *table, slots, lengths, True, caching)
            operations.single_queries(rows)(query, kv_cache, 0.2, out, state, None)
            show(f"{case} reuses, step {step}", out, caching.counts)


if __name__ == "__main__":
    main()
