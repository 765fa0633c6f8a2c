"""With a budget that covers the context, TOKENSELECT is full attention.

At reassigned positions too: `tests/models` serves models of many families both ways.
"""

import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import BLOCK_SIZE, FP32, serving

# In every run: `tests/models`, without a server.
pytestmark = [pytest.mark.server, pytest.mark.endurance]

# 16 tokens short of a full block: each request needs one more block while it generates.
LENGTHS = [BLOCK_SIZE * blocks - 16 for blocks in (2, 3, 4, 6, 9, 10, 12, 14)]
MAX_TOKENS = 32
SHARED_BLOCKS = 4
LAYERS = 5


def test_eight_requests_with_shared_prefixes_and_preemption_say_the_same(
    smollm2, prompts, tmp_path
):
    model = first_layers(smollm2, tmp_path / "shortened", LAYERS)
    shared = prompts(0, 1200)[: SHARED_BLOCKS * BLOCK_SIZE + 88]
    batch = [prompts(1 + i, n, shared if n > 1000 else None) for i, n in enumerate(LENGTHS)]
    sharing = sum(n > 1000 for n in LENGTHS)
    needed = sum(-(-n // BLOCK_SIZE) for n in LENGTHS) - (sharing - 1) * SHARED_BLOCKS
    # One block is vLLM's own; two are left for the eight requests that need one more each.
    blocks = ("--num-gpu-blocks-override", str(needed + 3), "--max-model-len", "4096")
    servers = (("CPU_ATTN", None), ("TOKENSELECT", {"top_k": 8192}))
    said = []
    for backend, settings in servers:
        with serving(
            model, backend=backend, settings=settings, extra_args=(*FP32, *blocks)
        ) as client:
            client.complete(batch[-1], 1)  # puts the shared prefix into the cache
            said.append(client.complete_all(batch, MAX_TOKENS))
            assert client.metric("vllm:num_preemptions_total") > 0
            assert client.metric("vllm:prefix_cache_hits_total") > 0
    for full, ours in zip(*said, strict=True):
        assert ours.tokens == full.tokens
        assert ours.logprobs == pytest.approx(full.logprobs, abs=1e-3)
