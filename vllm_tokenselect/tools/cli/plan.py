"""The options of `tokenselect plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from vllm_tokenselect.tools.cli.errors import said_in_words


def plan(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="Model folder with a config.json, a name, or a preset: llama-3.1-8b, qwen3-32b ...",
        ),
    ],
    context: Annotated[str, Option(help="Longest context in tokens: 131072, 128K, 1M.")] = "128K",
    gpus: Annotated[
        str,
        Option(help="Number of GPUs in all. Several numbers, separated by commas, are compared."),
    ] = "1",
    tp: Annotated[
        int | None,
        Option(min=1, help="Tensor-parallel GPUs of each stage. Default: compare layouts."),
    ] = None,
    pp: Annotated[
        int | None, Option(min=1, help="Pipeline stages. Default: compare layouts.")
    ] = None,
    replicas: Annotated[
        int | None,
        Option(
            min=1, help="Number of servers behind a router. Default: as many as the GPUs allow."
        ),
    ] = None,
    gpus_per_machine: Annotated[
        int, Option(min=1, help="GPUs that a link as fast as NVLink connects.")
    ] = 8,
    gpu_memory: Annotated[
        str,
        Option(help="Kind of GPU (a100, a100-40gb, h100, h200, b200) or its memory: 141GB, 80GiB."),
    ] = "h200",
    gpu_memory_utilization: Annotated[float, Option(help="Same as vLLM's option.")] = 0.9,
    settings: Annotated[str, Option(help="Settings of tokenselect, as JSON.")] = "{}",
    dtype: Annotated[
        str, Option(help="Type of activations: auto, bfloat16, float16 or float32.")
    ] = "auto",
    kv_cache_dtype: Annotated[
        str, Option(help="Type of the KV cache: auto, fp8, fp8_e4m3 or fp8_e5m2.")
    ] = "auto",
    weights_dtype: Annotated[
        str | None,
        Option(
            help="Type of the layers' weights: fp8, int4 ..., or bytes per weight. Default: --dtype."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        Option(min=1, help="Same as vLLM's option. Default: vLLM's default for the GPU."),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        Option(min=1, help="Same as vLLM's option. Default: vLLM's default for the GPU."),
    ] = None,
    reserve: Annotated[
        str, Option(help="Memory that CUDA, NCCL and CUDA graphs take: a guess.")
    ] = "2GiB",
    each_setting: Annotated[
        bool,
        Option("--each-setting", help="Show what each setting costs when it alone is changed."),
    ] = False,
    json_path: Annotated[
        Path | None, Option("--json", help="Write all results to this file, sizes in bytes.")
    ] = None,
) -> None:
    """Compute how much GPU memory and network a model needs on TOKENSELECT, and propose a layout.

    Layouts are compared unless --tp and --pp are given. Memory and traffic are computed, speed is not:
    nothing is run, and the model's weights are not read. Sizes are those of one GPU, in units of 1,024.
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
