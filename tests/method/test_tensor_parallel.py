"""A layer's heads on two ranks: together they select as one process would, apart each for itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.method.ranks import GlooHeads, on_ranks
from tests.method.serving import HEADS, Request, Server
from tests.oracle.step import ReferenceStep
from vllm_tokenselect.cpu.step import CpuStep

PROMPTS = {"longer": 90, "short": 20}
# Request, position, and the heads that ask for something else from there on: those of one rank only.
FIRST, SECOND = slice(0, 3), slice(3, 6)
CHANGES_OF_MIND = [(0, 103, FIRST), (0, 127, SECOND), (0, 151, FIRST), (1, 83, SECOND)]


def serve(rank: int, vote: str, kv_heads: int) -> None:
    """Serve two requests on one rank, by each kind of step."""
    for step_class in (ReferenceStep, CpuStep):
        serve_by(step_class, rank, vote, kv_heads)


def serve_by(step_class: type[CpuStep], rank: int, vote: str, kv_heads: int) -> None:
    """Every step is compared with the definition."""
    whole = [Request(name, prompt, kv_heads=kv_heads) for name, prompt in PROMPTS.items()]
    for request, position, heads in CHANGES_OF_MIND:
        whole[request].queries[position:, heads] *= -1
    for request in whole:
        request.define()
    own = [request.share(rank, 2, apart=vote == "local") for request in whole]
    together = GlooHeads(kv_heads) if vote == "global" else None
    torch.manual_seed(0)
    server = Server(step_class, HEADS // 2, max(kv_heads // 2, 1), together)
    long, short = own
    server.start(long, short)
    server.step((long, 64), (short, 20))
    server.step((short, 1), (long, 26))
    for _ in range(90):
        if together is not None:
            together.calls.clear()
        server.step((long, 1), (short, 1))
        if together is not None:
            kinds = {request.rows[request.done - 1][1] for request in own}
            exchanges = {"reused": ["gather"], "reselected": ["gather", "sum"], "dense": []}
            assert together.calls == max((exchanges[kind] for kind in kinds), key=len)
    kinds = Counter(request.rows[p][1] for request in own for p in range(request.done))
    assert {"reselected", "reused", "dense"} == set(kinds), "the test should see all"
    assert server.counts[1] == kinds["reused"]
    apart = [request.rows == of_all.rows for request, of_all in zip(own, whole, strict=True)]
    assert apart == [vote == "global"] * 2, "one rank's heads alone select other tokens"


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["a KV head each", "the same KV head"])
@pytest.mark.parametrize("vote", ["global", "local"])
def test_ranks_attend_to_what_the_definition_says(tmp_path, vote, kv_heads):
    on_ranks(tmp_path, serve, vote, kv_heads)
