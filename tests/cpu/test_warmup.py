"""After the warm-up nothing is left to compile."""

import subprocess
import sys

import numba
import pytest
import torch

from tests.kernels.cases import (
    SHAPES,
    Case,
    int32,
    make_group,
    make_softmax,
    paged_cache,
    run_group,
)
from vllm_tokenselect.cpu import step, verbs, warmup
from vllm_tokenselect.kernels.attend import cpu as attend
from vllm_tokenselect.kernels.block_table import cpu as block_table
from vllm_tokenselect.kernels.gather import cpu as gather
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.score import cpu as score
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.kernels.vote import cpu as vote
from vllm_tokenselect.kernels.write import cpu as write
from vllm_tokenselect.method.settings import Method

KERNELS = [
    score.score_rows,
    vote.vote_rows,
    block_table.build_rows,
    gather._gather,
    attend.attend_rows,
    verbs.attend,
    step._run_rows,
    write._write,
]


@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[4], SHAPES[7]], ids=str)
def test_no_kernel_is_compiled_after_the_warm_up(case: Case):
    warmup.compile_cpu_kernels(
        case.torch_dtype, case.head_size, case.num_heads, case.num_kv_heads, case.block_size
    )
    compiled = [len(kernel.signatures) for kernel in KERNELS]

    kv_cache, table = paged_cache(case)
    query = torch.randn(case.rows, case.num_heads, case.head_size)
    row_seq = torch.arange(case.rows, dtype=torch.int32)
    ends = torch.full((case.rows,), case.tokens, dtype=torch.int32)
    slots = torch.empty((case.rows, case.tokens), dtype=torch.int32)
    lengths = torch.empty_like(ends)
    out = torch.empty_like(query, dtype=case.torch_dtype)
    keys = torch.zeros((16, case.num_kv_heads, case.head_size), dtype=case.torch_dtype)
    votes = vote.soft_vote(score.score_paged_keys(query, kv_cache, table, row_seq, 0, ends, 0.1))
    state = SelectionCacheState.allocate(
        case.rows, 16, case.num_heads, case.head_size, case.torch_dtype, torch.device("cpu")
    )
    query_in_dtype, method = query.to(case.torch_dtype), Method(n_init=0, refresh_interval=4)
    caching = {"caches": torch.ones(case.rows).bool(), "seat": row_seq, "owner": row_seq + 1}
    for wanted, selects in ((16, True), (case.tokens, False)):
        top_k = torch.full((case.rows,), wanted, dtype=torch.int32)
        table_rows = (table, row_seq, 0, top_k, ends, ends, case.block_size, slots, lengths)
        block_table.build_sparse_block_table(votes if selects else None, *table_rows)
        for part, kept in (({}, None), (caching if selects else {}, state)):
            rows = (row_seq, row_seq, top_k, ends - 1, slots, lengths)
            for softmax in ({}, make_softmax(case, "sinks and a cap")):
                cache = LayerCache(kv_cache, selections=kept, **softmax)
                group = make_group(*rows, selects, **part)
                run_group(group, query_in_dtype, cache, table, method, out)
    write.write_tokens(keys, keys, kv_cache, slots[0, :16].long())
    gather.gather_tokens(kv_cache, slots[0, :16], keys, keys.clone())

    assert [len(kernel.signatures) for kernel in KERNELS] == compiled


def test_numba_gets_the_threads_of_pytorch():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        warmup.use_torch_threads()
        assert numba.get_num_threads() == 1
        torch.set_num_threads(10_000)
        warmup.use_torch_threads()
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    finally:
        torch.set_num_threads(threads)
        warmup.use_torch_threads()


def test_pytorch_keeps_its_threads_when_numba_starts():
    program = (
        "import torch; torch.set_num_threads(1);"
        "from vllm_tokenselect.cpu.warmup import compile_cpu_kernels;"
        "compile_cpu_kernels(torch.bfloat16, 64, 9, 3, 32);"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kernels_out_of_numbas_cache_run_in_a_process_that_has_not_started_its_threads():
    program = (
        "from tests.kernels.test_attend import test_a_row_without_tokens_gives_zeros as attend;"
        "attend()"
    )
    for _ in ("compiled, or out of the cache", "out of the cache"):
        subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_openmp_library_is_named(monkeypatch):
    def fail(threads: int) -> None:
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(numba, "set_num_threads", fail)
    with pytest.raises(RuntimeError, match="libgomp1"):
        warmup.use_torch_threads()


def test_an_unknown_cache_dtype_is_refused():
    kv_cache = torch.zeros(1, 1, 2, 16, 64, dtype=torch.float64)
    arguments = (torch.zeros(1, 1, 64), kv_cache, int32(0).view(1, 1), int32(0), 0, int32(5), 1.0)
    with pytest.raises(KeyError):
        score.score_paged_keys(*arguments)
