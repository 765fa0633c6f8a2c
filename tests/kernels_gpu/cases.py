"""Paged caches in the layouts that vLLM has on GPUs, and shapes that the kernels must get right."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.kernels.cases import DTYPES as CPU_DTYPES
from tests.kernels.cases import Case, paged_cache

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
