"""What the served model says under selection is what a plain PyTorch forward of the definition says."""

import pytest

from tests.oracle.model import OracleModel, Selection
from tests.server.conftest import SPARSE

pytestmark = pytest.mark.server

LENGTHS = [1000 + 37 * i for i in range(12)] + [1600, 1900, 2300, 2700, 3300, 4000, 4900, 6000]
MAX_TOKENS = 8
# Where the oracle itself cannot tell two tokens apart, rounding may decide between them.
UNDECIDED_NATS = 1e-4


@pytest.fixture(scope="module")
def oracle(smollm2):
    settings = {name: value for name, value in SPARSE.items() if name != "log_requests"}
    return OracleModel(smollm2, Selection(**settings))


def assert_same_tokens(served, expected, name):
    tokens, logprobs, leads = expected
    for position, (ours, theirs) in enumerate(zip(served.tokens, tokens, strict=True)):
        if ours != theirs:
            assert leads[position] < UNDECIDED_NATS, (
                f"{name}: token {position} is {ours}, the oracle's is {theirs}, "
                f"ahead by {leads[position]:.2e} nats"
            )
            return  # what follows an undecided token is another text
        assert abs(served.logprobs[position] - logprobs[position]) < 1e-3, f"{name}: {position}"


def test_twenty_prompts_sent_twice_and_again_with_half_of_them_shared(
    sparse_client, oracle, prompts
):
    first = [prompts(seed, length) for seed, length in enumerate(LENGTHS)]
    halves = [
        prompts(100 + seed, length, shared=first[seed][: length // 2])
        for seed, length in enumerate(LENGTHS)
    ]
    hits_before = sparse_client.metric("vllm:prefix_cache_hits_total")
    served = [
        sparse_client.complete_all(batch, MAX_TOKENS)
        for batch in (first[:10], first[10:], first[:10], first[10:], halves[:10], halves[10:])
    ]
    hits = sparse_client.metric("vllm:prefix_cache_hits_total") - hits_before
    assert hits > 10_000, "the second sending must hit the prefix cache"

    expected = [oracle.generate(prompt, MAX_TOKENS) for prompt in (*first, *halves)]
    for sending, batches in (("first", served[0:2]), ("second", served[2:4])):
        for i, completion in enumerate([*batches[0], *batches[1]]):
            assert_same_tokens(completion, expected[i], f"prompt {i}, {sending} time")
    for i, completion in enumerate([*served[4], *served[5]]):
        assert_same_tokens(completion, expected[len(first) + i], f"prompt {i}, half of it shared")
