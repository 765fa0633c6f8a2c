"""How large a decoding step vLLM may capture as a CUDA graph, and how much context it may have.

A captured step is scored at once, so the workspace has to hold the scores of all its contexts. The
scheduler sees to it (`hooks.graph_contexts`). A step without a graph is cut for the contexts that it has.
"""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.replayed_steps import queries_per_request, replays_steps
from vllm_tokenselect.gpu.graph_size import fits_a_graph, workspace_for
from vllm_tokenselect.gpu.limits import GRAPH_GROUPS, StepLimits


def captured_steps(vllm_config: Any) -> list[int]:
    """Tokens of each decoding step that vLLM captures as a whole; none without full graphs."""
    compilation = vllm_config.compilation_config
    if not replays_steps(vllm_config):
        return []
    most = vllm_config.scheduler_config.max_num_seqs * queries_per_request(vllm_config)
    return [size for size in compilation.cudagraph_capture_sizes or () if size <= most]


def step_limits(vllm_config: Any, num_heads: int, num_kv_heads: int) -> StepLimits:
    """What the workspace of layers with so many heads is cut for.

    Raises:
        SettingsError: when the setting `workspace_mb` is too small for the longest context.
    """
    from vllm_tokenselect.engine.gpu_libraries import serves_full_attention

    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    scheduler = vllm_config.scheduler_config
    decoding = scheduler.max_num_seqs * queries_per_request(vllm_config)
    # It never grows: vLLM has chosen it before the model is made.
    largest = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return StepLimits(
        method=config.method,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_model_len=vllm_config.model_config.max_model_len,
        workspace_bytes=config.workspace_bytes("cuda"),
        full_attention=serves_full_attention(vllm_config) is None,
        max_tokens=scheduler.max_num_batched_tokens,
        graph_rows=min(decoding, largest),
        graph_queries=queries_per_request(vllm_config),
    )


def limit_engine(vllm_config: Any) -> None:
    """`limit_captured_sizes` with the limits of the model's layers on one rank.

    Raises:
        SettingsError: when the setting `workspace_mb` is too small for the longest context.
    """
    limit_captured_sizes(vllm_config, _limits_of_model(vllm_config))


def _limits_of_model(vllm_config: Any) -> StepLimits:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
    return step_limits(vllm_config, *heads)


def limit_captured_sizes(vllm_config: Any, limits: StepLimits) -> None:
    """Leave out the sizes of steps that are faster without a CUDA graph, and say so.

    Args:
        vllm_config: with its sizes chosen; changed.
        limits: those of a layer's steps.
    """
    queries = queries_per_request(vllm_config)
    steps = captured_steps(vllm_config)
    kept = [size for size in steps if fits_a_graph(limits, size, queries)]
    if len(kept) == len(steps):
        return
    compilation = vllm_config.compilation_config
    largest = max(kept, default=0)
    sizes = [size for size in compilation.cudagraph_capture_sizes if size <= largest]
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = largest
    get_logger(__name__).warning(
        "TOKENSELECT: steps of more than %d tokens run without CUDA graphs: %s",
        largest,
        _why_no_graph(limits, queries),
    )


def _why_no_graph(limits: StepLimits, queries: int) -> str:
    needed = queries * limits.max_width
    if needed > limits.score_columns:
        enough = -(-workspace_for(limits, queries) // 2**20)
        return (
            f"workspace_mb={limits.workspace_bytes >> 20} holds the scores of {limits.score_columns} "
            f"tokens of context, and the {queries} tokens of a request may need {needed}. Set workspace_mb "
            f"to at least {enough}, or lower --max-model-len."
        )
    return (
        f"with contexts of up to {limits.max_model_len} tokens a group has {limits.table_rows} of them, "
        f"and a graph pays up to {GRAPH_GROUPS} groups. Lower --max-model-len or --max-num-seqs."
    )


def replayed_limits(vllm_config: Any) -> StepLimits | None:
    """What steps that CUDA graphs may replay have to fit; None where there are none.

    Raises:
        SettingsError: when the setting `workspace_mb` is too small for the longest context.
    """
    return _limits_of_model(vllm_config) if captured_steps(vllm_config) else None
