"""How many kernels a decoding step launches: the nodes of a CUDA graph, counted without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from vllm_tokenselect.gpu.cutting import graph_spans
from vllm_tokenselect.gpu.limits import GRAPH_PASSES, StepLimits
from vllm_tokenselect.kernels.block_table.gpu import DIGIT_BITS, choose_parts


def num_passes(limits: StepLimits, num_tokens: int, queries_per_request: int) -> int:
    """Passes of scoring of a captured step."""
    groups = graph_spans(limits, num_tokens, queries_per_request)
    return sum(len(passes) for _, _, passes in groups)


def fits_a_graph(limits: StepLimits, num_tokens: int, queries_per_request: int) -> bool:
    """Whether a graph of such a step pays: a captured step does the passes of its longest possible
    contexts, however short they are.
    """
    return num_passes(limits, num_tokens, queries_per_request) <= GRAPH_PASSES


def workspace_for(limits: StepLimits, num_tokens: int) -> int:
    """Bytes of the workspace with which a step of so many single queries has `GRAPH_PASSES` passes."""
    rows = -(-num_tokens // GRAPH_PASSES)
    group = min(num_tokens, limits.table_rows)
    return 4 * limits.max_width * (group + limits.num_heads * min(rows, group))


def count_launches(
    limits: StepLimits,
    num_tokens: int,
    queries_per_request: int,
    attention: Callable[[int], int],
    together: bool = False,
) -> int:
    """Launches of a layer in a captured step.

    Args:
        limits: of the buffers.
        num_tokens: tokens of the step, padding included.
        queries_per_request: most tokens of a request.
        attention: launches of the library that attends, for a number of rows.
        together: whether the heads of several processes vote together; an exchange counts as one.
    """
    reuses, rotates = limits.method.reuses_selections, limits.method.reassigns_positions
    launches = 0
    for first, last, passes in graph_spans(limits, num_tokens, queries_per_request):
        rows = last - first
        if reuses:
            launches += 1 + 3 * together  # decide; clamp, gather and exchange the heads' queries
        if passes:
            launches += 1 + rotates  # average
        launches += 2 * len(passes)  # score, vote
        launches += together and bool(passes)
        launches += _table_launches(rows, limits.max_width or limits.table_width, bool(passes))
        launches += 1 + rotates + attention(rows)  # finish, rotate, attend
    return launches


def _table_launches(rows: int, width: int, selects: bool) -> int:
    if choose_parts(rows, width) == 1:
        return 1
    return 1 + selects * (1 + len(DIGIT_BITS) + 1)  # write; reset, count each digit, count the kept
