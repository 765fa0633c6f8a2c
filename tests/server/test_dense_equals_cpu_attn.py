"""With a budget that covers the context, TOKENSELECT is full attention."""

import pytest

from tests.server.conftest import FP32, serving

pytestmark = pytest.mark.server

LENGTHS = [200, 350, 700, 1100, 1500, 2000, 2500, 3000]
MAX_TOKENS = 96


def test_eight_requests_with_shared_prefixes_and_preemption_say_the_same(smollm2, prompts):
    shared = prompts(0, 1200)[:600]
    batch = [prompts(1 + i, n, shared if n > 1000 else None) for i, n in enumerate(LENGTHS)]
    # 90 blocks of 128 tokens hold the eight prompts but not what they generate: some must yield.
    blocks = ("--num-gpu-blocks-override", "98")
    said = {}
    for backend, settings in (("CPU_ATTN", None), ("TOKENSELECT", {"top_k": 8192})):
        with serving(
            smollm2, backend=backend, settings=settings, extra_args=(*FP32, *blocks)
        ) as client:
            client.complete(batch[-1], 1)  # puts the shared prefix into the cache
            said[backend] = client.complete_all(batch, MAX_TOKENS)
            assert client.metric("vllm:num_preemptions_total") > 0
            assert client.metric("vllm:prefix_cache_hits_total") > 0
    for full, ours in zip(said["CPU_ATTN"], said["TOKENSELECT"], strict=True):
        assert ours.tokens == full.tokens
        assert ours.logprobs == pytest.approx(full.logprobs, abs=1e-3)
