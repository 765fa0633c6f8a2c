"""Two ranks that vote together, on the GPU's path: eagerly, and as a graph replays it."""

from __future__ import annotations

import pytest

from tests.gpu.test_anchors import Layers
from tests.gpu.test_anchors import decode as decode_layers
from tests.gpu.test_selection_cache import (
    KINDS,
    KV_HEADS,
    MAX_LEN,
    Graph,
    Running,
    Server,
    decode,
)
from tests.method.ranks import GlooHeads, on_ranks
from vllm_tokenselect.gpu import limits

FIRST, SECOND = slice(0, 3), slice(3, 6)
EXCHANGES = ["gather", "sum"]


def serve(rank: int, table_bytes: int) -> None:
    """Decode three requests on one rank, eagerly and replayed."""
    limits.TABLE_BYTES = table_bytes  # this process is the rank's own
    for captured in (False, True):
        decode_three(rank, captured)
    follow(rank)


def decode_three(rank: int, captured: bool) -> None:
    """Every step is compared with the definition."""
    together = GlooHeads(KV_HEADS)
    server = Server([200, 150, 90], together=together, rank=rank)
    # Only one rank's heads ask for something else from there on.
    for text, position, heads in ((0, 108, FIRST), (0, 113, SECOND), (1, 127, SECOND)):
        server.texts[text].queries[position:, heads] *= -1
    graph = Graph(server, 5) if captured else None
    running = [Running(0, 2, 1, 100), Running(1, 0, 2, 100), Running(2, 3, 3, 40)]
    together.calls.clear()
    decode(server, running, [100, 120, 40], 20, graph)
    assert all(server.expected[kind] >= 5 for kind in KINDS)
    if captured:
        groups = len(graph.captured)
        assert together.calls == EXCHANGES * groups * 20, "the same in every step"


def follow(rank: int) -> None:
    """A layer that follows attends to what all ranks selected, and exchanges nothing."""
    together = GlooHeads(KV_HEADS)
    layers = Layers([200, 150], followers=(1, None), together=together, rank=rank)
    graph = Graph(layers.first, 3)
    together.calls.clear()
    requests = [layers.request(0, 2, 1, 100), layers.request(1, 0, 2, 100)]
    decode_layers(layers, requests, [110, 120], 3, graph)
    assert layers.first.expected["shared"] == 6
    assert together.calls == EXCHANGES * len(graph.captured) * 3


@pytest.mark.parametrize("rows", [512, 2], ids=["one group", "several groups"])
def test_ranks_select_what_one_process_with_all_heads_would(tmp_path, rows):
    on_ranks(tmp_path, serve, 4 * MAX_LEN * rows)
