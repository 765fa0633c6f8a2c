"""The options of `tokenselect plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_tokenselect.tools.cli.refusals import said_in_words


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder with a config.json, a name, or a preset: llama-3.1-8b, qwen3-32b ...",
        ),
    ],
    context: Annotated[
        str, typer.Option(help="Tokens of the longest context: 131072, 128K, 1M.")
    ] = "128K",
    gpus: Annotated[str, typer.Option(help="GPUs in all; several numbers with commas.")] = "1",
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallel GPUs.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Servers behind a router.")] = None,
    gpus_per_machine: Annotated[
        int, typer.Option(min=1, help="GPUs joined by something as fast as NVLink.")
    ] = 8,
    gpu_memory: Annotated[
        str, typer.Option(help="a100, a100-40gb, h100, h200, b200, or a size: 141GB, 80GiB.")
    ] = "h200",
    gpu_memory_utilization: Annotated[float, typer.Option(help="As vLLM has it.")] = 0.9,
    settings: Annotated[str, typer.Option(help="tokenselect settings, JSON.")] = "{}",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8, fp8_e4m3 or fp8_e5m2")] = "auto",
    weights_dtype: Annotated[
        str | None,
        typer.Option(help="Of the layers: fp8, int4 ..., or bytes of a weight; default: --dtype."),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="As vLLM has it; default: vLLM's for the GPU.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="As vLLM has it; default: vLLM's for the GPU.")
    ] = None,
    reserve: Annotated[
        str, typer.Option(help="Memory for CUDA, NCCL and CUDA graphs: a guess.")
    ] = "2GiB",
    each_setting: Annotated[
        bool, typer.Option("--each-setting", help="What each setting costs, changed by itself.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything here, in bytes.")
    ] = None,
) -> None:
    """Say what a model takes of GPU memory and network on TOKENSELECT, and which layout to take.

    Compares layouts unless --tp and --pp are given. A model of memory and traffic, not of speed: nothing is
    run, and the model's weights are not read. Sizes are those of one GPU, in units of 1,024.
    """
    with said_in_words():
        from vllm_tokenselect.tools.plan.command import PlanOptions, run_plan

        run_plan(
            PlanOptions(
                model=model,
                context=context,
                gpus=gpus,
                tp=tp,
                pp=pp,
                replicas=replicas,
                gpus_per_machine=gpus_per_machine,
                gpu_memory=gpu_memory,
                gpu_memory_utilization=gpu_memory_utilization,
                settings=settings,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                weights_dtype=weights_dtype,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                reserve=reserve,
                each_setting=each_setting,
            ),
            json_path,
        )
