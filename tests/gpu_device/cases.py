"""Sizes of served models on a GPU, and small ones for Triton's interpreter where there is none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.device import use_interpreter_without_gpu

DEVICE = use_interpreter_without_gpu()  # before Triton is imported

from benchmarks.attention.baselines import Unavailable, flash_varlen  # noqa: E402
from benchmarks.attention.cases import (  # noqa: E402
    BLOCK_SIZE,
    SHAPES,
    Data,
    Shape,
    TokenSelectLayer,
    Work,
)
from vllm_tokenselect.method.settings import Method  # noqa: E402

ON_GPU = DEVICE.type == "cuda"
CONTEXT = 70_001 if ON_GPU else 701
LONG_CONTEXT = 1_000_003 if ON_GPU else 5_003
SMOLLM2 = Shape("SmolLM2", 9, 3, 64)
ALL_SHAPES = (*SHAPES, SMOLLM2, Shape("a rank of Gemma", 8, 2, 256)) if ON_GPU else (SMOLLM2,)
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, **FP8}
if not ON_GPU:
    del DTYPES["bf16"]  # The interpreter multiplies bf16 wrongly; other tests widen it.


def paged_cache(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [blocks, Hkv, 2, 16, D] as vLLM lays it out, and the block table of one request."""
    width = -(-tokens // BLOCK_SIZE)
    cache = torch.randn(
        (width + 7, BLOCK_SIZE, shape.num_kv_heads, 2, shape.head_size), device=DEVICE
    ).to(dtype)
    table = torch.randperm(width + 7, device=DEVICE)[:width].to(torch.int32)
    return cache.permute(0, 2, 3, 1, 4), table[None]


def decoding_layer(shape: Shape = SHAPES[0]) -> TokenSelectLayer:
    """A layer that decodes with FlashAttention 3, or with PyTorch's SDPA where it is missing."""
    varlen: Callable[..., object] | None
    try:
        varlen = flash_varlen()
    except Unavailable:
        varlen = None
    method = Method() if ON_GPU else Method(top_k=200, n_init=16, n_local=32)
    work = Work(shape, CONTEXT, batch=4 if ON_GPU else 1, queries=1)
    return TokenSelectLayer(Data(work, DEVICE, 4 << 30), method, varlen)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Say |actual - expected| / |expected| and refuse more than is allowed, and any NaN."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    print(f"relative error {difference:.2g} of {allowed:g} ", end="")
    assert difference <= allowed
