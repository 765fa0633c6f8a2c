"""Random paged caches in the shapes that the operations must get right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.rows import RowGroup
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.method.settings import Method

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """`rows` requests of about `tokens` tokens; prints as `R3-N513-H9/3-D64-B16-bf16`."""

    rows: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str

    def __str__(self) -> str:
        heads = f"H{self.num_heads}/{self.num_kv_heads}"
        shape = f"D{self.head_size}-B{self.block_size}"
        return f"R{self.rows}-N{self.tokens}-{heads}-{shape}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


SHAPES = [
    Case(1, 640, 9, 3, 64, 32, "bf16"),
    Case(3, 513, 9, 3, 64, 16, "bf16"),
    Case(2, 1031, 28, 4, 128, 32, "bf16"),
    Case(4, 257, 8, 1, 96, 128, "bf16"),
    Case(2, 700, 4, 4, 80, 16, "fp16"),
    Case(3, 333, 14, 2, 64, 128, "fp16"),
    Case(2, 517, 6, 2, 256, 32, "fp32"),
    Case(5, 97, 7, 1, 72, 16, "fp32"),
    Case(2, 45, 3, 1, 37, 16, "bf16"),
    Case(12, 1300, 9, 3, 64, 32, "bf16"),
]


def paged_cache(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache and a block table whose block ids are shuffled; row 1 shares row 0's first block."""
    generator = torch.Generator().manual_seed(case.rows * case.tokens)
    width = -(-case.tokens // case.block_size)
    num_blocks = case.rows * width + 3
    shape = (num_blocks, case.num_kv_heads, 2, case.block_size, case.head_size)
    kv_cache = torch.randn(shape, generator=generator).to(case.torch_dtype)
    blocks = torch.randperm(num_blocks, generator=generator)[: case.rows * width]
    block_table = blocks.view(case.rows, width).to(torch.int32)
    if case.rows > 1:
        block_table[1, 0] = block_table[0, 0]
    return kv_cache, block_table


def make_rotation(case: Case, share: float = 1.0, num_positions: int | None = None) -> Rotation:
    """RoPE of the first part of each head, with a magnitude as YaRN has; the vote's distance is 9."""
    rotated = max(int(case.head_size * share) // 2 * 2, 2)
    frequencies = 100.0 ** -(torch.arange(0, rotated, 2) / rotated)
    positions = torch.arange(num_positions or case.tokens + 9)
    angles = torch.outer(positions.float(), frequencies)
    table = torch.cat([angles.cos(), angles.sin()], dim=1) * 1.1
    return Rotation.from_table(table, len(table), n_local=9)


# What may change a softmax; the cap bites where scores are a few times as large.
SOFTMAX: dict[str, tuple[bool, float]] = {
    "sinks": (True, 0.0),
    "cap": (False, 2.0),
    "sinks and a cap": (True, 2.0),
}


def make_softmax(case: Case, name: str) -> dict[str, Any]:
    """Arguments of attention; a sink is about as large as all scores (times 0.3) together."""
    has_sinks, soft_cap = SOFTMAX[name]
    generator = torch.Generator().manual_seed(case.num_heads)
    sinks = torch.randn(case.num_heads, generator=generator) * 3 + 0.045 * case.head_size + 6
    return {"sinks": sinks if has_sinks else None, "soft_cap": soft_cap}


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_group(
    query_start: torch.Tensor,
    row_seq: torch.Tensor,
    top_k: torch.Tensor,
    candidate_end: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    selects: bool = True,
    caches: torch.Tensor | None = None,
    seat: torch.Tensor | None = None,
    owner: torch.Tensor | None = None,
) -> RowGroup:
    """Rows of one query, the token behind their candidates; they share the memory of the tensors."""
    none = torch.zeros_like(row_seq)
    return RowGroup(
        row_seq=row_seq.numpy(),
        query_start=query_start.numpy(),
        query_len=np.ones(len(row_seq), np.int32),
        top_k=top_k.to(torch.int32).numpy(),
        seat=(none if seat is None else seat).numpy(),
        owner=(none if owner is None else owner).numpy(),
        caches=(none.bool() if caches is None else caches).numpy(),
        candidate_end=candidate_end.numpy(),
        context_end=(candidate_end + 1).numpy(),
        slots=slots.numpy(),
        lengths=lengths.numpy(),
        selects=selects,
        follows=False,
        max_query_len=1,
    )


def run_group(
    group: RowGroup,
    query: torch.Tensor,
    cache: LayerCache,
    block_table: torch.Tensor,
    method: Method,
    out: torch.Tensor,
    scale: float = 0.2,
    counters: torch.Tensor | None = None,
    step_class: type[CpuStep] = CpuStep,
) -> None:
    """Compute a layer of a step that has these rows only."""
    if counters is None:
        counters = torch.zeros(len(Counter), dtype=torch.int64)
    step = step_class([group], block_table, cache.pages.shape[3], method, counters)
    step.run_layer(query, cache, scale, _no_attention, out)


def _no_attention(*_: object) -> None:
    raise AssertionError("rows of one query attend in place")
