"""Compile every Triton kernel for GPUs that are not here, and report what it takes of them.

    python -m tests.kernels_gpu.compile_ahead            # a table; fails where registers are spilled
    python -m tests.kernels_gpu.compile_ahead --shapes few    # those that CI compiles for each GPU

Runs the kernels' own launchers on CPU tensors with a driver that knows only the target and with every
launch turned into a compilation, so that what is compiled is what would be launched.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vllm_tokenselect.method.settings import Method

ARCHITECTURES = (80, 90, 100)
# Bytes that may be spilled: the assembler spills one register, written once and read once, where more
# programs then fit on a multiprocessor.
ONE_REGISTER = 8
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have
# An A100 knows no e4m3.
KV_DTYPES = {
    80: [torch.bfloat16, torch.float8_e5m2],
    90: [torch.bfloat16, torch.float8_e4m3fn],
    100: [torch.bfloat16, torch.float8_e4m3fn],
}
# Query heads, KV heads, head size: no grouping, SmolLM2, a rank of Gemma, Qwen2-7B, Qwen3-32B, Llama-405B,
# Gemma 4 E4B.
SHAPES = [
    (8, 8, 80),
    (9, 3, 64),
    (8, 2, 256),
    (28, 4, 128),
    (64, 8, 128),
    (128, 8, 128),
    (8, 2, 512),
]
# Without shapes that differ from another in nothing but how many heads there are.
FEWER_HEADS = [shape for shape in SHAPES if shape not in ((64, 8, 128), (128, 8, 128))]
# An odd head size, one with every variant, and the largest head.
FEW = [(8, 8, 80), (28, 4, 128), (8, 2, 512)]
CHOICES = {"all": SHAPES, "fewer heads": FEWER_HEADS, "few": FEW}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture."""

    kernel: str
    variant: str
    architecture: int
    registers: int
    shared_bytes: int
    spilled_bytes: int

    @property
    def fits(self) -> bool:
        small = self.shared_bytes <= SHARED_MEMORY[self.architecture]
        return self.spilled_bytes <= ONE_REGISTER and small


class AbsentGpu:
    """As much of a driver as the compiler asks for."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(architecture: int, compiled: list[Any]) -> Iterator[None]:
    """Within it a kernel's launch compiles it for the architecture, and adds it to `compiled`."""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(AbsentGpu(architecture))
    try:
        yield
    finally:
        JITFunction.run = run


def launches(
    architecture: int, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launcher, in these shapes of models."""
    from vllm_tokenselect.counters import Counter
    from vllm_tokenselect.gpu.cutting import MOST_CHUNKS
    from vllm_tokenselect.kernels.block_table.gpu import TableScratch, build_sparse_block_table
    from vllm_tokenselect.kernels.block_table.gpu_digits import EXPONENTS, num_lines
    from vllm_tokenselect.kernels.block_table.table import SparseBlockTable
    from vllm_tokenselect.kernels.columns import Columns
    from vllm_tokenselect.kernels.gather.gpu import gather_rows
    from vllm_tokenselect.kernels.mean_query.gpu import mean_queries
    from vllm_tokenselect.kernels.rotate.gpu import rotate_queries
    from vllm_tokenselect.kernels.score.gpu import Scores, score_paged_keys, tile_rows
    from vllm_tokenselect.kernels.selection_cache.gpu import finish_rows
    from vllm_tokenselect.kernels.selection_cache.gpu_decide import Decision, decide_rows
    from vllm_tokenselect.kernels.selection_cache.gpu_rows import RowArrays
    from vllm_tokenselect.kernels.selection_cache.gpu_table import build_finished_table
    from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
    from vllm_tokenselect.kernels.vote.gpu import soft_vote
    from vllm_tokenselect.kernels.vote.gpu_rescoring import vote_rescoring

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def selections(heads: int, head_size: int) -> SelectionCacheState:
        return SelectionCacheState.allocate(
            8, Method().selection_size, heads, head_size, torch.bfloat16, torch.device("cpu")
        )

    rows, width, tokens, scale = 64, 4096, 512, torch.ones(1)
    arrays = RowArrays(*[ints(rows)] * 11, ints(rows, 2))
    columns = Columns.equal(rows, width)

    def scores_of(num_rows: int, heads: int, stored: bool = True) -> Scores:
        parts = torch.zeros(num_rows, heads, 64)
        logits = torch.zeros(heads, num_rows * width) if stored else None
        return Scores(logits, columns, parts, parts, 128, ints(num_rows))

    def decision_of(query: torch.Tensor, state: SelectionCacheState, kv_heads: int) -> Decision:
        return Decision(query, ints(rows), kv_heads, arrays, 128, 0.9, 64, state)

    for head_size in (64, 80, 128, 256, 512):
        query = torch.zeros(64, 4, head_size, dtype=torch.bfloat16)
        means = torch.zeros(rows, 4, head_size)
        name = f"D{head_size}"
        yield name, lambda q=query, m=means: mean_queries(q, ints(rows), ints(rows), m)
        for rotated in (head_size, head_size // 4):
            table = torch.zeros(4096, rotated)
            name = f"D{head_size}, {rotated} rotated"
            yield (
                name,
                lambda q=query, t=table: rotate_queries(
                    query=q,
                    query_start=ints(rows),
                    query_len=ints(rows),
                    max_query_len=1,
                    lengths=ints(rows),
                    cos_sin=t,
                    out=torch.empty_like(q),
                ),
            )
            yield (
                name,
                lambda q=query, m=means, t=table: mean_queries(q, ints(rows), ints(rows), m, t[0]),
            )
    for block_size in (16, 64, 128):
        slots = ints(rows, 3200)
        scratch = TableScratch(rows * width, rows, torch.device("cpu"))
        for votes in (None, torch.zeros(rows * width)):
            yield (
                f"B{block_size}{', dense' if votes is None else ''}",
                lambda b=block_size, v=votes, s=slots, c=scratch: build_sparse_block_table(
                    votes=v,
                    columns=columns,
                    block_table=ints(8, 256),
                    row_seq=ints(rows),
                    n_init=128,
                    top_k=ints(rows),
                    candidate_ends=ints(rows),
                    context_ends=ints(rows),
                    block_size=b,
                    slots=s,
                    lengths=ints(rows),
                    scratch=c,
                ),
            )
        stored = selections(28, 128)
        decision = decision_of(torch.zeros(rows, 28, 128, dtype=torch.bfloat16), stored, 4)
        for state, decided in ((None, None), (stored, None), (stored, decision)):
            kind = ", counts only" if state is None else ", query stored" if decided else ""
            yield (
                f"B{block_size}, finished{kind}",
                lambda b=block_size, s=state, t=slots, c=scratch, d=decided: build_finished_table(
                    votes=torch.zeros(rows * width),
                    columns=columns,
                    block_table=ints(8, 256),
                    rows=arrays,
                    n_init=128,
                    block_size=b,
                    table=SparseBlockTable(t, ints(rows)),
                    scratch=c,
                    counted=True,
                    state=s,
                    counters=torch.zeros(len(Counter), dtype=torch.int64),
                    decision=d,
                ),
            )
        for state in (None, stored):
            yield (
                f"B{block_size}{', counts only' if state is None else ''}",
                lambda b=block_size, s=state, t=slots: finish_rows(
                    rows=arrays,
                    block_table=ints(8, 256),
                    n_init=128,
                    block_size=b,
                    state=s,
                    table=SparseBlockTable(t, ints(rows)),
                    counters=torch.zeros(len(Counter), dtype=torch.int64),
                ),
            )
    for heads, kv_heads, head_size in shapes:
        query = torch.zeros(rows, heads, head_size, dtype=torch.bfloat16)
        means = query.float()
        state = selections(heads, head_size)
        yield (
            f"H{heads}/{kv_heads} D{head_size}",
            lambda q=query, s=state, k=kv_heads: decide_rows(decision_of(q, s, k)),
        )
        scores = scores_of(rows, heads)
        name = f"H{heads}/{kv_heads} D{head_size}"
        for counts in (None, ints(num_lines(rows * width, rows), EXPONENTS).to(torch.int16)):
            yield (
                f"{name}{', uncounted' if counts is None else ''}",
                lambda s=scores, c=counts: soft_vote(s, torch.zeros(rows * width), c),
            )
        for dtype in KV_DTYPES[architecture]:
            pages = paged(kv_heads, head_size, dtype)
            kinds = [(1, query), (tile_rows(heads, kv_heads), means)]
            if (
                head_size == 128 and heads == 28
            ):  # elsewhere they take what lies between the other two
                kinds += [(1, means), (tile_rows(heads, kv_heads), query)]
            kinds = [(lines, asking, None) for lines, asking in kinds]
            kinds.append((1, query, decision_of(query, state, kv_heads)))
            for lines, asking, decision in kinds:
                yield (
                    f"{name} {str(dtype)[6:]}, {lines} {'rows' if asking is query else 'means'}"
                    f"{', decided' if decision else ''}",
                    lambda q=asking, p=pages, n=lines, h=heads, d=decision: score_paged_keys(
                        query=q,
                        kv_cache=p,
                        block_table=ints(8, 256),
                        tiles=ints(4, 3),
                        rows_per_tile=n,
                        scale=0.1,
                        key_scale=scale,
                        scores=scores_of(n, h),
                        query_start=ints(n) if q.dtype == torch.bfloat16 else None,
                        decision=d,
                    ),
                )
            chunks = min(tile_rows(heads, kv_heads), MOST_CHUNKS)
            twice = {
                "query": means,
                "kv_cache": pages,
                "block_table": ints(8, 256),
                "tiles": ints(4, 3),
                "rows_per_tile": chunks,
                "scale": 0.1,
                "key_scale": scale,
                "scores": scores_of(chunks, heads, stored=False),
            }
            variant = f"{name} {str(dtype)[6:]}, {chunks} chunks"
            yield variant, lambda a=twice: score_paged_keys(**a)
            yield variant, lambda a=twice: vote_rescoring(**a, votes=torch.zeros(rows * width))
            for rotated in (False, True):
                out = torch.zeros(2, tokens, kv_heads, head_size, dtype=torch.bfloat16)
                yield (
                    f"{name} {str(dtype)[6:]}{', rotated' if rotated else ''}",
                    lambda p=pages, o=out, r=rotated, d=head_size: gather_rows(
                        kv_cache=p,
                        slots=ints(2, 3200),
                        lengths=ints(2),
                        out_keys=o,
                        out_values=o,
                        cos_sin=torch.zeros(4096, d) if r else None,
                        key_scale=scale,
                        value_scale=scale,
                        zeroed=128,
                    ),
                )
            yield from attending(name, heads, pages)


def attending(
    name: str, heads: int, pages: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The own attention for a cache, and where it may run out of registers what else it can do."""
    from vllm_tokenselect.kernels.attend.gpu import AttendScratch, attend_rows

    kv_heads, head_size = pages.shape[1], pages.shape[4]
    rows, width = 64, 3200
    query = torch.zeros(rows, heads, head_size, dtype=torch.bfloat16)
    lengths, starts = torch.zeros(2, rows + 1, dtype=torch.int32)
    variants: dict[str, dict[str, Any]] = {"": {}}
    if heads in (28, 8):
        variants[", rotated"] = {"cos_sin": torch.zeros(width, head_size)}
    if heads == 28:
        variants[", drafts"] = {"max_query_len": 3}
        variants[", sinks"] = {"sinks": torch.zeros(heads), "soft_cap": 50.0}
    for variant, arguments in variants.items():
        yield (
            f"{name} {str(pages.dtype)[6:]}{variant}",
            lambda a=arguments: attend_rows(
                **{
                    "query": query,
                    "query_start_loc": starts,
                    "max_query_len": 1,
                    "kv_cache": pages,
                    "slots": torch.zeros(rows, width, dtype=torch.int32),
                    "lengths": lengths[:rows],
                    "max_length": width,
                    "scale": 0.1,
                    "scratch": AttendScratch(
                        rows, width, heads, kv_heads, head_size, torch.device("cpu")
                    ),
                    "out": torch.empty_like(query),
                    "key_scale": torch.ones(1),
                    "value_scale": torch.ones(1),
                    **a,
                }
            ),
        )


def paged(num_kv_heads: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    """A cache as vLLM lays it out on GPUs: all heads of a token together, keys beside values."""
    cache = torch.zeros(8, 16, num_kv_heads, 2 * head_size).to(dtype)
    return cache.unflatten(-1, (2, head_size)).permute(0, 2, 3, 1, 4)


def resources(kernel: Any, architecture: int) -> tuple[int, int]:
    """Registers a thread and spilled bytes of a compiled kernel, as the assembler reports them."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = tools / "ptxas-blackwell"  # knows older GPUs too, and every PTX that Triton writes
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [assembler, "-v", f"--gpu-name=sm_{architecture}{suffix}", source]
        report = subprocess.run(
            [*command, "-o", source.with_suffix(".cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def compile_all(architecture: int, shapes: Sequence[tuple[int, int, int]]) -> Iterator[Compiled]:
    for variant, launch in launches(architecture, shapes):
        kernels: list[Any] = []
        with compiling_for(architecture, kernels):
            launch()
        for kernel in kernels:
            registers, spilled = resources(kernel, architecture)
            name, shared = kernel.metadata.name, kernel.metadata.shared
            yield Compiled(name, variant, architecture, registers, shared, spilled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--shapes", choices=CHOICES, default="all", help="default: all")
    arguments = parser.parse_args()
    architecture = arguments.architecture
    if architecture is None:
        # Triton keeps what it compiled by device, of which there is one: a process each.
        command = [sys.executable, "-m", "tests.kernels_gpu.compile_ahead"]
        command += ["--shapes", arguments.shapes, "--architecture"]
        return max(subprocess.run([*command, str(each)]).returncode for each in ARCHITECTURES)
    bad = 0
    print(f"{'kernel':14} {'variant':36} sm  registers  shared B  spilled B")
    for one in compile_all(architecture, CHOICES[arguments.shapes]):
        bad += not one.fits
        print(
            f"{one.kernel:14} {one.variant:36} {one.architecture:3} {one.registers:6} "
            f"{one.shared_bytes:12} {one.spilled_bytes:8}{'' if one.fits else '  DOES NOT FIT'}",
            flush=True,
        )
    print(f"sm_{architecture}: {f'{bad} do not fit' if bad else 'all fit'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
