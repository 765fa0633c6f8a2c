"""What a layer on a GPU is estimated to cost, from the launches of real plans. Nothing is measured.

    python -m benchmarks.gpu_cost
    python -m benchmarks.gpu_cost --shapes Qwen2-7B --contexts 131072 --batches 1 8 --kernels

A step is planned and cut as a server does it, and every launch of a layer is noted with its arguments in
place of being launched. What each kernel reads, writes and computes follows from them. Times follow from
the assumptions below, and are good for a comparison of two designs, not for a promise. Beside them stands
what FlashAttention 3 would need at least: all keys and values once, or its products, at those rates.
"floor" is what an exact selection needs at least: the keys of all candidates once, and the keys and
values of what it attends to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from benchmarks.attention.cases import PREFILL_QUERIES, SHAPES, Work
from benchmarks.gpu_cost.estimate import figures
from benchmarks.gpu_cost.gpu import add_gpu_options, gpu_of
from benchmarks.gpu_cost.steps import ROLES, Case, method_of
from benchmarks.gpu_cost.tables import K, show, show_kernels, show_markdown, wide_console
from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.provenance import now, typed_command, versions


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [4 * K, 8 * K, 32 * K, 128 * K, 512 * K, 1024 * K]
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--contexts", type=int, nargs="+", default=lengths, help="tokens")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 32], help="requests of a decoding step"
    )
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument(
        "--prefill",
        type=int,
        default=PREFILL_QUERIES,
        help="queries of a prefill step; 0 leaves it out",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        default=1024 * K,
        help="longest context of the server, for which its buffers and captured steps are cut",
    )
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON: TokenSelect's settings"
    )
    parser.add_argument("--kernels", action="store_true", help="say what each kernel takes")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    add_gpu_options(parser)
    return parser.parse_args(argv)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every layer that was asked for; contexts that the server does not take are left out."""
    settings = Method(**args.settings)
    contexts = [context for context in args.contexts if context <= args.max_model_len]
    for shape in (shape for shape in SHAPES if shape.name in args.shapes):
        for context in contexts:
            for role in args.roles:
                method = method_of(role, settings)
                works = [Work(shape, context, batch, 1) for batch in args.batches]
                if args.prefill > 0 and role in ("reselecting", "dense"):
                    works.append(Work(shape, context, 1, min(args.prefill, context)))
                for work in works:
                    for captured in (False, True) if work.queries == 1 else (False,):
                        yield Case(work, role, captured, args.max_model_len, method)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    gpu, console = gpu_of(args), wide_console()
    report: dict[str, Any] = {
        "kind": "estimates from counts; nothing was measured",
        "command": typed_command(["python", "-m", "benchmarks.gpu_cost"]),
        "date": now(),
        "versions": versions(("vllm-tokenselect", "torch")) | {"triton": triton.__version__},
        "assumptions": vars(gpu),
        "results": [],
    }
    for case in cases(args):
        report["results"].append(figures(case, gpu, args.kernels))
    for shape in args.shapes:
        results = [result for result in report["results"] if result["shape"] == shape]
        if args.markdown:
            show_markdown(shape, results, console)
        else:
            show(shape, results, console)
        if args.kernels:
            show_kernels(results, console)
    write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
