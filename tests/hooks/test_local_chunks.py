"""Llama 4: most layers attend within chunks of the context; a prompt that comes again hits at its limit.

vLLM frees the blocks of chunks that have passed, and looks a hit up in the chunk alone in which it ends.
"""

from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from tests.hooks.workload import Arrival, Engine, start_engine

LOCAL = Engine(query_chunk=64, tail_queries=10, block_size=16, budget=500, local_chunk=96)


@pytest.fixture
def starts(make_vllm_config):
    """Serve prompts one after the other; where the first step of each begins."""

    def serve(engine: Engine, *texts: list[tuple[int, int]]) -> list[int]:
        workload, found = start_engine(engine, make_vllm_config()), []
        for text in texts:
            before = len(workload.steps)
            workload.run([Arrival(0, text)], most_steps=50)
            found.append(workload.steps[before][1])
        return found

    return serve


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("budget", [68, 500], ids=["query chunk by query chunk", "all at once"])
@pytest.mark.parametrize(
    ("length", "limit"),
    [(394, 384), (393, 320), (202, 192), (138, 128), (73, 0)],
    ids=["where a chunk ends", "inside a chunk", "two chunks", "inside the second", "none"],
)
def test_the_second_identical_prompt_hits_at_its_limit(starts, length, limit, budget, asynchronous):
    engine = replace(LOCAL, budget=budget, asynchronous=asynchronous)
    assert starts(engine, [(5, length)], [(5, length)]) == [0, limit]


def test_prompts_that_begin_alike_share_whole_query_chunks(starts):
    """They part at token 300, in the middle of a query chunk and of a local one."""
    texts = [[(5, 300), (other, 400)] for other in (6, 7)]
    assert starts(LOCAL, *texts) == [0, 256]


def test_without_the_hybrid_manager_all_layers_keep_all_blocks_and_hits_are_the_same(starts):
    """As vLLM serves these models by default."""
    engine = replace(LOCAL, local_chunk=0)
    for length in (394, 393, 138):
        text = [(5, length)]
        assert starts(engine, text, text) == starts(LOCAL, text, text)
