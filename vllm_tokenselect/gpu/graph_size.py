"""How many kernels a decoding step launches: the nodes of a CUDA graph, counted without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from vllm_tokenselect.gpu.cutting import graph_spans
from vllm_tokenselect.gpu.limits import GRAPH_GROUPS, StepLimits
from vllm_tokenselect.kernels.block_table.gpu import num_launches


def num_groups(limits: StepLimits, num_tokens: int, queries_per_request: int) -> int:
    """Groups of rows of a captured step."""
    return len(list(graph_spans(limits, num_tokens, queries_per_request)))


def fits_a_graph(limits: StepLimits, num_tokens: int, queries_per_request: int) -> bool:
    """Whether a graph of such a step pays, and the workspace holds any request in it."""
    few = num_groups(limits, num_tokens, queries_per_request) <= GRAPH_GROUPS
    return few and queries_per_request * limits.max_width <= limits.score_columns


def largest_graph(limits: StepLimits, most_tokens: int) -> int:
    """Tokens of the largest step of single queries of which a graph pays; 0 for none."""
    fitting = (n for n in range(most_tokens, 0, -1) if fits_a_graph(limits, n, 1))
    return next(fitting, 0)


def workspace_for(limits: StepLimits, contexts: int) -> int:
    """Bytes of the workspace that holds the scores of so many of the longest contexts at once."""
    return 4 * contexts * limits.max_width * (limits.num_heads + 1)


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
    launches, selects = 0, limits.max_width > 0
    for first, last in graph_spans(limits, num_tokens, queries_per_request):
        rows = last - first
        rotates, attend = method.reassigns_positions, attention(rows)
        if follows:
            launches += attend
            continue
        # Heads in several processes: clamp, gather and exchange their queries. Otherwise the programs that
        # score a row decide for it, if its request has no other.
        apart = together or queries_per_request > 1 or not selects
        decide = method.reuses_selections * (apart + 3 * together)
        # Average the queries of a row, and rotate the means.
        averages = rotates or queries_per_request > 1
        score_and_vote = selects * (averages + 2)
        # Votes that are exchanged are counted behind it.
        build_table = selects * together + num_launches(selects, counted=not together)
        # Where no request has several rows, the kernel that writes the table finishes.
        finish = method.reuses_selections and queries_per_request > 1
        launches += decide + score_and_vote + build_table + finish + attend
    return launches
