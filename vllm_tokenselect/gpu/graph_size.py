"""How many kernels a decoding step launches: the nodes of a CUDA graph, counted without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from vllm_tokenselect.gpu.cutting import graph_spans
from vllm_tokenselect.gpu.limits import GRAPH_PASSES, StepLimits
from vllm_tokenselect.kernels.block_table.gpu import num_launches


def num_passes(limits: StepLimits, num_tokens: int, queries_per_request: int) -> int:
    """Passes of scoring of a captured step."""
    groups = graph_spans(limits, num_tokens, queries_per_request)
    return sum(len(passes) for _, _, passes in groups)


def fits_a_graph(limits: StepLimits, num_tokens: int, queries_per_request: int) -> bool:
    """Whether a graph of such a step pays: a captured step does the passes of its longest possible
    contexts, however short they are.
    """
    return num_passes(limits, num_tokens, queries_per_request) <= GRAPH_PASSES


def largest_graph(limits: StepLimits, most_tokens: int) -> int:
    """Tokens of the largest step of single queries of which a graph pays; 0 for none."""
    fitting = (n for n in range(most_tokens, 0, -1) if fits_a_graph(limits, n, 1))
    return next(fitting, 0)


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
    follows: bool = False,
) -> int:
    """Launches of a layer in a captured step: those of each verb of `GpuStep.run_layer`.

    Args:
        limits: of the buffers.
        num_tokens: tokens of the step, padding included.
        queries_per_request: most tokens of a request.
        attention: launches of what attends, for a number of rows; of rotating the queries too.
        together: whether the heads of several processes vote together; an exchange counts as one.
        follows: whether the layer attends to what another one has selected.
    """
    method = limits.method
    launches = 0
    for first, last, passes in graph_spans(limits, num_tokens, queries_per_request):
        rows, selects = last - first, bool(passes)
        rotates, attend = method.reassigns_positions, attention(rows)
        if follows:
            launches += attend
            continue
        # Heads in several processes: clamp, gather and exchange their queries.
        decide = method.reuses_selections * (1 + 3 * together)
        # Average the queries of a row, and rotate the means.
        averages = rotates or queries_per_request > 1
        score = selects * averages + len(passes)
        vote = len(passes)
        # Votes that are exchanged are counted behind it.
        build_table = selects * together + num_launches(selects, counted=not together)
        # Where no request has several rows, the kernel that writes the table finishes.
        finish = method.reuses_selections and queries_per_request > 1
        launches += decide + score + vote + build_table + finish + attend
    return launches
