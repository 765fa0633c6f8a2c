"""Counts without a GPU: launches of a layer, and what the compiler makes of every kernel.

    python -m benchmarks.gpu_code --json after.json
    python -m benchmarks.gpu_code --json after.json --against before.json

Kernels are compiled for a GPU that is not here, in every shape that is served. Their machine code is
disassembled and its instructions are counted where they stand, not as often as they run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu_code.counts import kernels, layers
from benchmarks.gpu_code.tables import kernel_table, layer_table
from benchmarks.gpu_cost.tables import wide_console
from tests.kernels_gpu.compile_ahead import ARCHITECTURES
from vllm_tokenselect.kernels.gpu_launch import INTERPRETED
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.provenance import now, typed_command, versions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--launches", action="store_true", help="compile nothing")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[""],
        help="beginnings of names of kernels' variants, such as B16 D128 H28/4 (default: all)",
    )
    parser.add_argument("--against", type=Path, help="file of an earlier run, to stand beside")
    parser.add_argument("--json", type=Path, help="write every count to this file")
    args, console = parser.parse_args(argv), wide_console()
    if INTERPRETED and not args.launches:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    earlier = json.loads(args.against.read_text()) if args.against else None
    report: dict[str, Any] = {
        "command": typed_command(["python", "-m", "benchmarks.gpu_code"]),
        "date": now(),
        "versions": versions(("vllm-tokenselect", "torch")) | {"triton": triton.__version__},
        "architecture": args.architecture,
        "layers": list(layers()),
        "kernels": [],
    }
    console.print(layer_table(report, earlier))
    for kernel in () if args.launches else kernels(args.architecture, tuple(args.variants)):
        console.print(f"{kernel['kernel']:16} {kernel['variant']}", style="dim", highlight=False)
        report["kernels"].append(kernel)
        write_json(args.json, report)
    write_json(args.json, report)
    if report["kernels"]:
        console.print(kernel_table(report, earlier))
    return 0


if __name__ == "__main__":
    sys.exit(main())
