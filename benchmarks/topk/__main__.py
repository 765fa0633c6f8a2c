"""Ways to select: this project's radix selection, torch's top-k, and vLLM's.

    python -m benchmarks.topk

All of them select from the same votes. The others do less: they write no sink, local tokens or table, and
need not keep an order among equal votes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import (
    Stopwatch,
    environment,
    use_interpreter_without_gpu,
)

DEVICE = use_interpreter_without_gpu()  # before Triton is imported

from vllm_tokenselect.kernels.block_table.gpu import (  # noqa: E402
    TableScratch,
    build_sparse_block_table,
)
from vllm_tokenselect.kernels.columns import Columns  # noqa: E402
from vllm_tokenselect.tools.common.files import write_json  # noqa: E402

TOP_K, N_INIT, N_LOCAL, BLOCK_SIZE = 2048, 128, 512, 16
SIZES = [(1, 1 << 13), (8, 1 << 15), (1, 1 << 17), (8, 1 << 17), (32, 1 << 17), (1, 1 << 20)]


def ways(rows: int, width: int) -> dict[str, Callable[[int], object]]:
    votes = torch.rand((rows, width), device=DEVICE) ** 6
    blocks = torch.arange(-(-(width + N_INIT + N_LOCAL) // BLOCK_SIZE), device=DEVICE)
    table = blocks.to(torch.int32).repeat(rows, 1)
    sequences = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    ends = torch.full((rows,), width + N_INIT, dtype=torch.int32, device=DEVICE)
    slots = torch.empty((rows, N_INIT + TOP_K + N_LOCAL + 1), dtype=torch.int32, device=DEVICE)
    lengths = torch.empty_like(sequences)
    columns = Columns.equal(rows, width, DEVICE)
    scratch = TableScratch(rows * width, rows, DEVICE)
    context_ends = ends + N_LOCAL + 1

    def own(counted: bool) -> Callable[[int], object]:
        return lambda turn: build_sparse_block_table(
            votes=votes.view(-1),
            columns=columns,
            block_table=table,
            row_seq=sequences,
            n_init=N_INIT,
            top_k=torch.full_like(ends, TOP_K),
            candidate_ends=ends,
            context_ends=context_ends,
            block_size=BLOCK_SIZE,
            slots=slots,
            lengths=lengths,
            scratch=scratch,
            counted=counted,
        )

    found: dict[str, Callable[[int], object]] = {
        "own": own(counted=False),
        "own, counted with the votes": own(counted=True),
        "torch.topk": lambda turn: votes.topk(TOP_K, dim=1, sorted=False),
    }
    try:
        import vllm._custom_ops as operations
    except ImportError:
        return found
    indices = torch.empty((rows, TOP_K), dtype=torch.int32, device=DEVICE)
    sizes = torch.full((rows,), width, dtype=torch.int32, device=DEVICE)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE)
    if hasattr(torch.ops._C, "persistent_topk"):
        found["vLLM persistent_topk"] = lambda turn: torch.ops._C.persistent_topk(
            votes, sizes, indices, workspace, TOP_K, width
        )
    if hasattr(torch.ops._C, "cooperative_topk"):
        found["vLLM cooperative_topk"] = lambda turn: torch.ops._C.cooperative_topk(
            votes, sizes, indices, workspace, TOP_K, width
        )
    if hasattr(torch.ops._C, "top_k_per_row_decode"):
        found["vLLM top_k_per_row_decode"] = lambda turn: operations.top_k_per_row_decode(
            votes, 1, sizes, indices, rows, votes.stride(0), votes.stride(1), TOP_K
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every result to this file as it comes")
    args = parser.parse_args()
    on_gpu = DEVICE.type == "cuda"
    stopwatch = Stopwatch(rounds=7 if on_gpu else 1, turns=10)
    report: dict[str, Any] = {"environment": environment(), "results": []}
    for rows, width in SIZES if on_gpu else [(1, 1 << 12)]:
        print(f"{rows} rows of {width:,} votes, top {TOP_K}: microseconds, median (range)")
        for name, call in ways(rows, width).items():
            result: dict[str, Any] = {"rows": rows, "votes": width, "way": name}
            try:
                call(0)
                time = stopwatch.compare({name: call})[name]
            except RuntimeError as error:
                result["error"] = str(error).splitlines()[0]
                print(f"  {name:28} does not run: {result['error']}", flush=True)
            else:
                result["us"] = asdict(time)
                spread = f"({time.min_us:.1f} to {time.max_us:.1f})"
                print(f"  {name:28} {time.median_us:9.1f} {spread}", flush=True)
            report["results"].append(result)
            write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
