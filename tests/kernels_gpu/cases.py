"""Paged caches in the layouts that vLLM has on GPUs, and shapes that the kernels must get right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from tests.kernels.cases import DTYPES as CPU_DTYPES
from tests.kernels.cases import Case, paged_cache
from vllm_tokenselect.kernels.columns import Columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's
DTYPES = {**CPU_DTYPES, "fp8": torch.float8_e4m3fn}

SHAPES = [
    Case(3, 513, 9, 3, 64, 16, "fp16"),
    Case(2, 331, 28, 4, 128, 32, "bf16"),
    Case(2, 257, 8, 1, 96, 128, "fp16"),
    Case(2, 190, 4, 4, 80, 16, "fp16"),
    Case(2, 150, 6, 2, 256, 64, "fp32"),
    Case(2, 301, 7, 1, 128, 16, "fp8"),
    Case(2, 140, 6, 1, 512, 16, "fp16"),
]


def device_cache(case: Case, layout: str = "tokens") -> tuple[torch.Tensor, torch.Tensor]:
    """The same cache and block table as `paged_cache`, laid out as vLLM lays it out.

    Args:
        layout: `tokens`, all heads of a token together (LBNHC), or `heads`, all tokens of a head of
            a block together (LBHNC); keys and values of a token and head lie side by side in both.

    Returns:
        kv_cache: a view [num_blocks, Hkv, 2, block_size, D]; block_table: int32 [rows, W].
    """
    kv_cache, block_table = paged_cache(replace(case, dtype="fp32"))
    kv_cache = kv_cache.to(DEVICE).to(DTYPES[case.dtype])
    if layout == "tokens":
        kv_cache = kv_cache.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    else:
        kv_cache = kv_cache.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
    return kv_cache, block_table.to(DEVICE)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def columns_for(candidates: Sequence[int], first: int = 8) -> Columns:
    """Columns for so many candidates of each row: some rows have more than they need."""
    starts = [first]
    for row, count in enumerate(candidates):
        starts.append(starts[-1] + -(-max(count, 0) // 4) * 4 + row % 3 * 4)
    widest = max((end - start for start, end in pairwise(starts)), default=0)
    return Columns(int32(*starts), widest)


def empty_columns(least: int, *shape: int) -> torch.Tensor:
    """NaNs: some more columns than there need to be, a multiple of 16."""
    return torch.full((*shape, -(-(least + 4) // 16) * 16), float("nan"), device=DEVICE)


def packed(rows: torch.Tensor, columns: Columns) -> torch.Tensor:
    """What [R, N] has in the rows' columns, and NaNs elsewhere."""
    flat = empty_columns(int(columns.starts[-1]))
    for row, start, end in _spans(columns):
        own = rows[row, : end - start]
        flat[start : start + len(own)] = own
    return flat


def unpacked(flat: torch.Tensor, columns: Columns, first: int = 0) -> torch.Tensor:
    """[..., C], of all columns from `first` on, as rows: [R, ..., widest], NaNs behind a row's columns."""
    shape = (columns.num_rows, *flat.shape[:-1], columns.widest)
    rows = torch.full(shape, float("nan"), device=DEVICE)
    for row, start, end in _spans(columns):
        rows[row, ..., : end - start] = flat[..., start - first : end - first]
    return rows


def _spans(columns: Columns) -> list[tuple[int, int, int]]:
    starts = columns.starts.tolist()
    return [(row, *starts[row : row + 2]) for row in range(columns.num_rows)]
