"""Every Triton kernel against its definition on this device, at the sizes of served models.

    python -m benchmarks.gpu_kernels

The tests ask the same at odd and tiny sizes; here are long contexts, bf16, fp8 and CUDA graphs. Without
a GPU the sizes shrink to what Triton's interpreter can do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.device import use_interpreter_without_gpu

DEVICE = use_interpreter_without_gpu()  # before Triton is imported

from benchmarks.attention_baselines import Unavailable, flash_varlen  # noqa: E402
from benchmarks.attention_cases import SHAPES, Data, Shape, TokenSelectLayer, Work  # noqa: E402
from benchmarks.gpu_libraries import attentions  # noqa: E402
from vllm_tokenselect.gpu.attention import RowAttention  # noqa: E402
from vllm_tokenselect.kernels.attend import reference as attend_reference  # noqa: E402
from vllm_tokenselect.kernels.block_table import gpu as table_gpu  # noqa: E402
from vllm_tokenselect.kernels.block_table import reference as table_reference  # noqa: E402
from vllm_tokenselect.kernels.gather import gpu as gather_gpu  # noqa: E402
from vllm_tokenselect.kernels.gather import reference as gather_reference  # noqa: E402
from vllm_tokenselect.kernels.score import gpu as score_gpu  # noqa: E402
from vllm_tokenselect.kernels.score import reference as score_reference  # noqa: E402
from vllm_tokenselect.kernels.vote import gpu as vote_gpu  # noqa: E402
from vllm_tokenselect.kernels.vote import reference as vote_reference  # noqa: E402
from vllm_tokenselect.method.settings import Method  # noqa: E402

ON_GPU = DEVICE.type == "cuda"
CONTEXT = 70_001 if ON_GPU else 701
LONG_CONTEXT = 1_000_003 if ON_GPU else 5_003
ALL_SHAPES = (*SHAPES, Shape("SmolLM2", 9, 3, 64), Shape("a rank of Gemma", 8, 2, 256))
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, **FP8}
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Check:
    """One comparison: its name, and what says by how much it is off, and by how much it may be."""

    name: str
    run: Callable[[], tuple[float, float]]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, infinite for a NaN."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float("inf") if difference.isnan() else float(difference)


def paged(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [blocks, Hkv, 2, 16, D] as vLLM lays it out, and the block table of one request."""
    width = -(-tokens // BLOCK_SIZE)
    cache = torch.randn(
        (width + 7, BLOCK_SIZE, shape.num_kv_heads, 2, shape.head_size), device=DEVICE
    ).to(dtype)
    table = torch.randperm(width + 7, device=DEVICE)[:width].to(torch.int32)
    return cache.permute(0, 2, 3, 1, 4), table[None]


def check_scores(shape: Shape, dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """Votes of rows of one request that share tiles; covers scores, their maxima and sums."""
    cache, table = paged(shape, CONTEXT, dtype)
    per_tile = min(rows, score_gpu.tile_rows(shape.num_heads, shape.num_kv_heads))
    tiles = [(0, first, min(per_tile, rows - first)) for first in range(0, rows, per_tile)]
    query = torch.randn((rows, shape.num_heads, shape.head_size), device=DEVICE)
    query = query.to(torch.bfloat16).float()  # so that the rounding of queries is not compared
    ends = torch.arange(CONTEXT - rows, CONTEXT, dtype=torch.int32, device=DEVICE)
    key_scale = torch.tensor([0.7], device=DEVICE) if dtype in FP8.values() else None
    logits = torch.empty((rows, shape.num_heads, CONTEXT), device=DEVICE)
    parts = torch.empty((2, rows, shape.num_heads, score_gpu.NUM_PARTS), device=DEVICE)
    start, scale = 128, 3 * shape.scale  # peaked, as real attention is
    scores = score_gpu.score_paged_keys(
        *(query, cache, table, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), per_tile),
        *(start, ends, scale, key_scale, logits, *parts),
    )
    votes = torch.zeros((rows, CONTEXT), device=DEVICE)
    vote_gpu.soft_vote(scores, votes)
    sequences = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    true_scale = scale * (1 if key_scale is None else 0.7)
    expected = vote_reference.soft_vote(
        score_reference.score_paged_keys(query, cache, table, sequences, start, ends, true_scale)
    )
    return relative_error(votes[:, : expected.shape[1]], expected), 1e-2


def check_table(context: int, parts: int | None, rows: int) -> tuple[float, float]:
    """The sparse block table, entry by entry; every tenth vote is a tie."""
    top_k, n_init, width = min(2048, context // 4), 128, -(-context // BLOCK_SIZE)
    votes = torch.rand((rows, context), device=DEVICE) ** 6
    votes[:, ::10] = votes[:, :1]
    table = torch.randperm(width, device=DEVICE).to(torch.int32)[None].expand(rows, -1)
    sequences = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    ends = (context - 512 - 3 * sequences).to(torch.int32)
    wanted = torch.full_like(ends, top_k)
    arguments = (votes, table, sequences, n_init, wanted, ends, ends + 513, BLOCK_SIZE)
    results = []
    for operation in (table_gpu, table_reference):
        slots = torch.zeros((rows, top_k + n_init + 600), dtype=torch.int32, device=DEVICE)
        lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        more = (table_gpu.TableScratch(rows, DEVICE), parts) if operation is table_gpu else ()
        operation.build_sparse_block_table(*arguments, slots, lengths, *more)
        results.append(torch.cat([slots, lengths[:, None]], dim=1))
    return float((results[0] != results[1]).sum()), 0.0


def check_gather(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    cache, _ = paged(shape, CONTEXT, dtype)
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
    return float((results[0] != results[1]).sum()), 0.0


def decoding_layer(shape: Shape = SHAPES[0]) -> TokenSelectLayer:
    try:
        varlen = flash_varlen()
    except Unavailable:
        varlen = None
    method = Method() if ON_GPU else Method(top_k=200, n_init=16, n_local=32)
    work = Work(shape, CONTEXT, 4 if ON_GPU else 1, 1)
    data = Data(work, DEVICE, 4 << 30)
    return TokenSelectLayer(data, method, varlen)


def check_graph() -> tuple[float, float]:
    """A captured layer, replayed with other queries, gives what launching it gives."""
    layer = decoding_layer()
    layer.run(0)
    replay: Callable[[], object] = lambda: layer.run(0)  # noqa: E731
    if ON_GPU:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.run(0)
        replay = graph.replay
    layer.data.query.normal_()
    layer.run(0)
    expected = layer.data.out.clone()
    layer.data.out.fill_(float("nan"))
    replay()
    return relative_error(layer.data.out, expected), 1e-6


def check_no_waiting() -> tuple[float, float]:
    """Neither cutting a decoding step into rows nor running its layers waits for the device."""
    layer = decoding_layer()
    layer.run(0)
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        layer.write_rows()
        layer.run(0)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    return 0.0, 0.0


def check_attention(
    layer: TokenSelectLayer, attention: RowAttention, sinks: torch.Tensor | None, soft_cap: float
) -> tuple[float, float]:
    """Outputs of a decoding step whose heads have sinks, or whose logits have a soft cap."""
    layer.attention, layer.cache = attention, replace(layer.cache, sinks=sinks)
    layer.run(0)
    (group,) = layer.steps[0].groups
    expected = torch.empty_like(layer.data.out)
    attend_reference.attend(
        *(layer.data.query, group.query_start_loc, layer.cache.pages),
        *(layer.workspace.slots(group), layer.workspace.lengths[: group.num_rows]),
        *(layer.data.work.shape.scale, expected),
        sinks=sinks,
        soft_cap=soft_cap,
    )
    return relative_error(layer.data.out, expected), 1e-2


def attention_checks() -> Iterator[Check]:
    gpt_oss, gemma = Shape("gpt-oss", 64, 8, 64), Shape("Gemma 2 9B", 16, 8, 256)
    sinks = torch.linspace(-2, 6, gpt_oss.num_heads, device=DEVICE).bfloat16()
    for shape, own, soft_cap in ((gpt_oss, sinks, 0.0), (gemma, None, 2.0)):
        layer = decoding_layer(shape)
        kind = "a soft cap" if own is None else "sinks"
        for name, make in attentions(shape, layer.method, soft_cap, DEVICE):
            yield Check(
                f"attention with {kind}, {shape.name}, {name}",
                lambda made=make, at=layer, s=own, c=soft_cap: check_attention(at, made(), s, c),
            )


def checks() -> Iterator[Check]:
    shapes = ALL_SHAPES if ON_GPU else ALL_SHAPES[3:4]
    capability = torch.cuda.get_device_capability() if ON_GPU else (9, 0)
    for shape in shapes:
        for name, dtype in DTYPES.items():
            if name == "fp8_e4m3" and capability < (8, 9):
                continue
            if not ON_GPU and name == "bf16":
                continue  # the interpreter's bf16 products are checked elsewhere, widened
            for rows in (1, 40) if ON_GPU else (3,):
                yield Check(
                    f"scores and votes, {shape.name} {name}, {rows} rows",
                    lambda s=shape, d=dtype, r=rows: check_scores(s, d, r),
                )
            yield Check(f"gather, {shape.name} {name}", lambda s=shape, d=dtype: check_gather(s, d))
    for context in (CONTEXT, LONG_CONTEXT):
        for parts in (1, None):
            yield Check(
                f"sparse block table of {context:,}, {parts or 'several'} programs a row",
                lambda c=context, p=parts: check_table(c, p, 3),
            )
    yield from attention_checks()
    yield Check("a CUDA graph's replay" if ON_GPU else "a second run", check_graph)
    yield Check("a decoding step does not wait for the device", check_no_waiting)


def main() -> int:
    failed = 0
    for check in checks():
        torch.manual_seed(0)
        error, allowed = check.run()
        failed += error > allowed
        print(f"{'FAIL' if error > allowed else 'pass'} {check.name}: {error:.2g} of {allowed:g}")
    print(f"{failed} failed" if failed else "all agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
