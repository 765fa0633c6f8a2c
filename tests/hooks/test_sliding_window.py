"""Models of which some layers see a sliding window only: a prompt that comes again hits at its limit.

vLLM keeps few blocks of such layers in the prefix cache: those before where it expects a hit to end.
"""

from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from tests.hooks.workload import Arrival, Engine, Workload, start_engine

SLIDING = Engine(query_chunk=64, tail_queries=10, block_size=16, budget=500, window=100)


@pytest.fixture
def starts(make_vllm_config):
    """Serve prompts one after the other; where the first step of each begins."""

    def serve(engine: Engine, *texts: list[tuple[int, int]]) -> list[int]:
        workload = start_engine(engine, make_vllm_config())
        return [start_of(workload, Arrival(0, text)) for text in texts]

    def start_of(workload: Workload, arrival: Arrival) -> int:
        before = len(workload.steps)
        workload.run([arrival], most_steps=50)
        return workload.steps[before][1]

    return serve


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("budget", [68, 500], ids=["chunk by chunk", "all at once"])
@pytest.mark.parametrize(
    ("length", "limit"), [(394, 384), (393, 320), (340, 320), (330, 320), (74, 64), (73, 0)]
)
def test_the_second_identical_prompt_hits_at_its_limit(starts, length, limit, budget, asynchronous):
    engine = replace(SLIDING, budget=budget, asynchronous=asynchronous)
    assert starts(engine, [(5, length)], [(5, length)]) == [0, limit]


def test_a_conversation_that_goes_on_hits_at_the_limit_of_what_it_was(starts):
    assert starts(SLIDING, [(5, 400)], [(5, 400), (7, 3), (6, 300)]) == [0, 384]


def test_what_other_prompts_begin_with_too_is_found_from_the_third_on(starts):
    """The second prompt finds that the first one's blocks of sliding windows are gone there."""
    texts = [[(5, 300), (other, 400)] for other in (6, 7, 8)]
    assert starts(SLIDING, *texts) == [0, 0, 256]


@pytest.mark.parametrize(("query_chunk", "block_size"), [(64, 128), (128, 16), (128, 128)])
def test_hits_end_with_blocks_and_with_chunks(starts, query_chunk, block_size):
    engine = replace(SLIDING, query_chunk=query_chunk, block_size=block_size)
    assert starts(engine, [(5, 340)], [(5, 340)]) == [0, 256]
