"""Rows of one query select and attend in one call as they do step by step."""

import pytest
import torch

from tests.kernels.cases import SHAPES, Case, int32, paged_cache
from vllm_tokenselect.kernels.single_queries import cpu, reference

N_INIT, TOP_K = 5, 20


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("selects", [True, False])
def test_both_fill_the_same_table_and_give_the_same_output(case: Case, selects: bool):
    kv_cache, block_table = paged_cache(case)
    rows, width = case.rows, case.tokens
    ends = torch.randint(N_INIT + TOP_K + 1, width - 1, (rows,), dtype=torch.int32)
    tokens = torch.randperm(rows + 3, dtype=torch.int32)[:rows]  # anywhere among the step's tokens
    query = torch.randn(rows + 3, case.num_heads, case.head_size).to(case.torch_dtype)
    results = []
    for operation in (cpu, reference):
        slots = torch.arange(rows * width, dtype=torch.int32).view(rows, width) % kv_cache.shape[0]
        lengths = torch.full((rows,), 17, dtype=torch.int32)
        out = torch.full_like(query, 9.0)
        table = (block_table, int32(*range(rows)), N_INIT, TOP_K, ends, ends + 1, case.block_size)
        layer = operation.single_queries(tokens, *table, slots, lengths, selects)
        layer(query, kv_cache, 0.2, out)
        results.append((slots, lengths, out))
    for actual, expected in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(actual, expected)
    tolerance = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 1e-2}[case.dtype]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=tolerance, atol=tolerance)
