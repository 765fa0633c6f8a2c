"""`tokenselect plan`: what a model needs of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.gpu.attention import FP8_DTYPES
from vllm_tokenselect.profiles import resolve_profile
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.options import SUCH_AS, json_object, one_of, positive_numbers
from vllm_tokenselect.tools.plan.choice import LayoutComparison, LayoutPlan, compare_layouts
from vllm_tokenselect.tools.plan.export import as_json
from vllm_tokenselect.tools.plan.models import ModelShape, read_model
from vllm_tokenselect.tools.plan.planned_server import (
    DTYPES,
    PlannedServer,
    find_gpu,
    weight_bytes,
)
from vllm_tokenselect.tools.plan.tables import (
    attention_table,
    layout_table,
    memory_table,
    network_table,
    settings_table,
)
from vllm_tokenselect.tools.plan.units import parse_bytes, parse_tokens
from vllm_tokenselect.tools.plan.variants import vary

WIDTH = 250  # of tables, so that no terminal cuts them


@dataclass(frozen=True)
class PlanOptions:
    """The options of the command, as they were typed."""

    model: str
    context: str
    gpus: str
    tp: int | None
    pp: int | None
    replicas: int | None
    gpus_per_machine: int
    gpu_memory: str
    gpu_memory_utilization: float
    settings: str
    dtype: str
    kv_cache_dtype: str
    weights_dtype: str | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    reserve: str
    each_setting: bool

    def server(self, model: ModelShape) -> PlannedServer:
        """The server to plan for.

        Raises:
            ValueError: for options that cannot be used.
        """
        gpu = find_gpu(self.gpu_memory)
        batched_tokens, seqs = gpu.batch
        dtype = one_of(self.dtype, {"auto": model.dtype, **DTYPES}, "--dtype")
        kv_dtype = one_of(self.kv_cache_dtype, {"auto": dtype, **FP8_DTYPES}, "--kv-cache-dtype")
        given = json_object(self.settings, "--settings", SUCH_AS)
        TokenSelectConfig.from_mapping(given)
        config = TokenSelectConfig.from_mapping(resolve_profile(given, model.of_profile).settings)
        return PlannedServer(
            gpu=gpu,
            context=parse_tokens(self.context),
            max_num_seqs=self.max_num_seqs or seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or batched_tokens,
            dtype=dtype,
            kv_dtype=kv_dtype,
            weight_bytes=weight_bytes(self.weights_dtype or str(dtype).removeprefix("torch.")),
            config=config,
            utilization=self.gpu_memory_utilization,
            reserve=parse_bytes(self.reserve),
        )

    def comparisons(self, model: ModelShape, server: PlannedServer) -> list[LayoutComparison]:
        """Layouts for each number of GPUs.

        Raises:
            ValueError: when there is none.
        """
        given = (self.gpus_per_machine, self.tp, self.pp, self.replicas)
        such_as = "a number of GPUs, or several as 1,8,64"
        numbers = positive_numbers(self.gpus, "--gpus", such_as)
        return [compare_layouts(model, server, gpus, *given) for gpus in numbers]


def run_plan(question: PlanOptions, json_path: Path | None) -> None:
    """Print the layouts, which one to take, and what it needs of a GPU.

    Raises:
        ValueError: with a message for the user; also when nothing fits.
    """
    model = read_model(question.model, quantized_ok=question.weights_dtype is not None)
    server = question.server(model)
    _check_settings(model, server)
    comparisons = question.comparisons(model, server)
    console = Console(width=WIDTH, highlight=False, markup=False)
    if len(comparisons) > 1 or len(comparisons[0].plans) > 1:
        console.print(layout_table(comparisons))
    if len(comparisons) == 1:
        _print_details(comparisons[0], question.each_setting, console)
    write_json(json_path, as_json(model, server, comparisons))
    _print_choice(comparisons, model, server, console)


def _check_settings(model: ModelShape, server: PlannedServer) -> None:
    method = server.config.method
    if method.reassigns_positions and method.max_attended > model.trained_length:
        raise ValueError(
            f'positions "reassigned" would number up to {method.max_attended:,} attended tokens, and '
            f"{model.name} was trained on {model.trained_length:,}: lower top_k"
        )
    if method.dense_layers >= len(model.layers):
        raise ValueError(
            f"dense_layers {method.dense_layers} leaves none of the {len(model.layers)} layers of "
            f"{model.name} to select"
        )


def _print_details(comparison: LayoutComparison, each_setting: bool, console: Console) -> None:
    plan = comparison.recommended or min(comparison.plans, key=_missing)
    if each_setting:
        console.print(settings_table(plan, vary(plan)))
        return
    for table in (memory_table(plan), attention_table(plan), network_table(plan)):
        console.print(table)


def _print_choice(
    comparisons: Sequence[LayoutComparison],
    model: ModelShape,
    server: PlannedServer,
    console: Console,
) -> None:
    if not any(comparison.recommended for comparison in comparisons):
        raise ValueError("\n".join(comparison.reason for comparison in comparisons))
    for comparison in comparisons:
        console.print(f"- {comparison.reason}", soft_wrap=True)
        for layout, refused in comparison.refused:
            console.print(f"- {layout}: {refused}", soft_wrap=True)
    if server.context > model.trained_length and not server.config.method.reassigns_positions:
        console.print(
            f"- {model.name} was trained on {model.trained_length:,} tokens: vLLM refuses a context of "
            f'{server.context:,} unless the setting positions is "reassigned".',
            soft_wrap=True,
        )


def _missing(plan: LayoutPlan) -> int:
    return plan.memory.missing
