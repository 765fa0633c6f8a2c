"""Each Triton kernel equals its definition at the sizes of served models: long contexts, bf16, fp8.

`tests/kernels_gpu` asks the same at odd and tiny sizes.
"""

from dataclasses import replace

import pytest
import torch

from tests.gpu_device.cases import (
    ALL_SHAPES,
    BLOCK_SIZE,
    CONTEXT,
    DEVICE,
    DTYPES,
    FP8,
    LONG_CONTEXT,
    ON_GPU,
    assert_close,
    paged_cache,
)
from vllm_tokenselect.kernels.block_table import gpu as table_gpu
from vllm_tokenselect.kernels.block_table import reference as table_reference
from vllm_tokenselect.kernels.columns import Columns
from vllm_tokenselect.kernels.gather import gpu as gather_gpu
from vllm_tokenselect.kernels.gather import reference as gather_reference
from vllm_tokenselect.kernels.score import gpu as score_gpu
from vllm_tokenselect.kernels.score import reference as score_reference
from vllm_tokenselect.kernels.vote import gpu as vote_gpu
from vllm_tokenselect.kernels.vote import reference as vote_reference
from vllm_tokenselect.kernels.vote.gpu_rescoring import vote_rescoring

pytestmark = pytest.mark.gpu

of_every_shape = pytest.mark.parametrize("shape", ALL_SHAPES, ids=lambda shape: shape.name)
of_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dtype_of(name: str) -> torch.dtype:
    if name == "fp8_e4m3" and ON_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8_e4m3")
    return DTYPES[name]


@of_every_dtype
@of_every_shape
@pytest.mark.parametrize("rows", [1, 40] if ON_GPU else [3], ids=lambda rows: f"{rows} rows")
def test_votes_of_rows_that_share_the_reading_of_keys(shape, dtype, rows):
    dtype = dtype_of(dtype)
    cache, table = paged_cache(shape, CONTEXT, dtype)
    per_tile = min(rows, score_gpu.tile_rows(shape.num_heads, shape.num_kv_heads))
    tiles = [(0, first, min(per_tile, rows - first)) for first in range(0, rows, per_tile)]
    query = torch.randn((rows, shape.num_heads, shape.head_size), device=DEVICE)
    ends = torch.arange(CONTEXT - rows, CONTEXT, dtype=torch.int32, device=DEVICE)
    key_scale = torch.tensor([0.7], device=DEVICE) if dtype in FP8.values() else None
    columns = Columns.equal(rows, -(-CONTEXT // 16) * 16, DEVICE)
    logits = torch.empty((shape.num_heads, rows * columns.widest), device=DEVICE)
    parts = torch.empty((2, rows, shape.num_heads, score_gpu.NUM_PARTS), device=DEVICE)
    start, scale = 128, 3 * shape.scale  # peaked, as real attention is
    scores = score_gpu.Scores(logits, columns, *parts, start, ends)
    tiles = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    score_gpu.score_paged_keys(query, cache, table, tiles, per_tile, scale, key_scale, scores)
    votes = torch.zeros((rows, columns.widest), device=DEVICE)
    vote_gpu.soft_vote(scores, votes.view(-1))
    sequences = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    true_scale = scale * (1 if key_scale is None else 0.7)
    expected = vote_reference.soft_vote(
        score_reference.score_paged_keys(query, cache, table, sequences, start, ends, true_scale)
    )
    assert_close(votes[:, : expected.shape[1]], expected, 1e-2)
    again = torch.zeros_like(votes)
    twice = (query, cache, table, tiles, per_tile, scale, key_scale, replace(scores, logits=None))
    score_gpu.score_paged_keys(*twice)
    vote_rescoring(*twice, again.view(-1))
    assert_close(again[:, : expected.shape[1]], expected, 1e-2)


@pytest.mark.parametrize("context", [CONTEXT, LONG_CONTEXT])
def test_sparse_block_table_entry_by_entry(context):
    """Every tenth vote is a tie."""
    rows, top_k, n_init = 3, min(2048, context // 4), 128
    width = -(-context // BLOCK_SIZE)
    columns = Columns.equal(rows, -(-context // 4) * 4, DEVICE)
    votes = torch.rand((rows, columns.widest), device=DEVICE) ** 6
    votes[:, ::10] = votes[:, :1]
    table = torch.randperm(width, device=DEVICE).to(torch.int32)[None].expand(rows, -1)
    sequences = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    ends = (context - 512 - 3 * sequences).to(torch.int32)
    wanted = torch.full_like(ends, top_k)
    arguments = (table, sequences, n_init, wanted, ends, ends + 513, BLOCK_SIZE)
    scratch = table_gpu.TableScratch(rows * columns.widest, rows, DEVICE)
    results = []
    for operation in (table_gpu, table_reference):
        slots = torch.zeros((rows, top_k + n_init + 600), dtype=torch.int32, device=DEVICE)
        lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        if operation is table_gpu:
            table_gpu.build_sparse_block_table(
                votes.view(-1), columns, *arguments, slots, lengths, scratch
            )
        else:
            table_reference.build_sparse_block_table(votes, *arguments, slots, lengths)
        results.append(torch.cat([slots, lengths[:, None]], dim=1))
    assert torch.equal(*results)


@of_every_dtype
@of_every_shape
def test_gathered_tokens(shape, dtype):
    dtype = dtype_of(dtype)
    cache, _ = paged_cache(shape, CONTEXT, dtype)
    slots = torch.randint(CONTEXT, (3, 2700), device=DEVICE).to(torch.int32)
    lengths = torch.tensor([2700, 0, 1333], dtype=torch.int32, device=DEVICE)
    scale = torch.tensor([0.5], device=DEVICE) if dtype in FP8.values() else None
    results = []
    for operation in (gather_gpu, gather_reference):
        out = torch.zeros(
            (2, 3, 2700, shape.num_kv_heads, shape.head_size),
            dtype=torch.bfloat16 if dtype in FP8.values() else dtype,
            device=DEVICE,
        )
        operation.gather_rows(cache, slots, lengths, *out, None, scale, scale)
        results.append(out)
    assert torch.equal(*results)
