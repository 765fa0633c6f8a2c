"""Steps that vLLM makes smaller than a query chunk: what was stuck ends, or is refused at start."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from tests.hooks.workload import Arrival, Engine, Workload, start_engine
from vllm_tokenselect.config import SettingsError
from vllm_tokenselect.method.settings import Method

LARGE = Engine(query_chunk=512, tail_queries=64, block_size=128, budget=2048 + 8, max_num_seqs=8)


@pytest.fixture
def serve(make_vllm_config):
    """Serve requests to their ends, in at most so many steps."""

    def run(engine: Engine, arrivals: list[Arrival], most_steps: int = 60) -> Workload:
        workload = start_engine(engine, make_vllm_config())
        workload.run(arrivals, most_steps)
        return workload

    return run


def steps_of(workload: Workload, request_id: str) -> list[tuple[int, int]]:
    request = workload.requests[request_id]
    return [
        (start, end)
        for whose, start, end, _ in workload.steps
        if whose is request and start < request.num_prompt_tokens
    ]


@pytest.mark.parametrize(
    ("setting", "engine"),
    [
        ("tail_queries=4 .* at least 5", {"tail_queries": 4}),
        ("query_chunk=8 .* at least 9", {"query_chunk": 8, "block_size": 8}),
        ("n_local=12 .* at least 13", {"drafts": 12}),
    ],
)
def test_prompts_that_could_not_stay_out_of_graphs_are_refused(serve, setting, engine):
    with pytest.raises(SettingsError, match=f"tokenselect {setting}, or leave graphs out"):
        serve(replace(LARGE, **{"drafts": 3, "shares": True} | engine), [])


def test_a_step_leaves_enough_of_a_prompt_to_be_no_decoding_step(serve):
    """Without, the first prompt's last token would come alone, as a generated one does."""
    engine = Engine(budget=68, shares=True)
    workload = serve(engine, [Arrival(0, [(1, 69)]), Arrival(0, [(2, 70)])])
    assert steps_of(workload, "0") == [(0, 67), (67, 69)]
    assert all(end - start > 1 for start, end in steps_of(workload, "1"))


def test_the_end_of_a_prompt_waits_for_a_step_with_room_for_more_than_a_decoding_step(serve):
    """The first prompt leaves 16 tokens of a step to the second, and then one, which does not do."""
    workload = serve(
        Engine(budget=80, shares=True), [Arrival(0, [(1, 143)]), Arrival(0, [(2, 20)])]
    )
    assert steps_of(workload, "0") == [(0, 64), (64, 143)]
    assert steps_of(workload, "1") == [(0, 16), (16, 20)]


@pytest.mark.parametrize(("sequences", "drafts", "needed"), [(8, 3, 544), (31, 8, 791)])
def test_a_prompt_does_not_wait_for_requests_that_draft(serve, sequences, drafts, needed):
    engine = replace(LARGE, block_size=16, max_num_seqs=sequences, drafts=drafts, budget=needed - 1)
    with pytest.raises(SettingsError, match=f"at least {needed}"):
        serve(engine, [])
    drafting = [Arrival(0, [(1 + index, 20)], max_tokens=100) for index in range(sequences - 1)]
    prompt = Arrival(5, [(99, 1000)], max_tokens=1)
    workload = serve(replace(engine, budget=needed), [*drafting, prompt], most_steps=200)
    assert len(steps_of(workload, str(sequences - 1))) == 2


def test_images_that_meet_in_a_chunk_are_encoded_together(serve):
    """Each of them fits vLLM's encoder cache, both do not, and the chunk from 1,536 on has both."""
    images = [(100, 1500, "a"), (1700, 1500, "b")]
    engine = replace(LARGE, encoder_limit=2048)
    workload = serve(engine, [Arrival(0, [(1, 3300)], images=images)])
    assert steps_of(workload, "0") == [(0, 1536), (1536, 2048), (2048, 3300)]


def test_an_image_that_fits_is_encoded_within_vllms_limits(serve):
    """The second request waits until the first has passed its image."""
    engine = replace(LARGE, encoder_limit=2048)
    both = [Arrival(0, [(1, 1700)], images=[(100, 1500, name)]) for name in "ab"]
    workload = serve(engine, both)
    cache = workload.scheduler.encoder_cache_manager
    assert set(cache.cached) == {"b"}, "the first one had to go"


def test_requests_do_not_wait_for_each_others_images(serve):
    """Each holds the image that its chunk begins in and waits for the one that it ends in."""
    a_chunk_each = {"long_prefill_token_threshold": 512}
    engine = replace(LARGE, budget=1040, scheduler=a_chunk_each, encoder_limit=2048)
    prompts = [
        Arrival(0, [(index, 1700)], images=[(100, 900, f"{index}a"), (1010, 400, f"{index}b")])
        for index in range(1, 5)
    ]
    workload = serve(engine, prompts)
    cache = workload.scheduler.encoder_cache_manager
    assert cache.num_freeable_slots == cache.cache_size


HYBRID = replace(LARGE, states=True, max_model_len=8192, spare_blocks=200)


# What vLLM chooses for models that people serve, on a GPU or a CPU.
BLOCKS = [16, 80, 128, 256, 528, 544, 640, 784, 896, 1056, 1152, 1568, 2096, 2176, 3200]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_hybrid_model_is_served_whatever_the_block_size(serve, block_size, prefix_caching):
    engine = replace(HYBRID, block_size=block_size, prefix_caching=prefix_caching)
    chunk = Method().for_blocks(block_size).query_chunk
    assert 256 < chunk <= 512
    for length in (200, 1000, 1400, 1470, 1500, 2000, 4700):
        for shared in (700, 1000, 2400):
            prompts = [
                Arrival(wait, [(1, min(shared, length)), (2 + wait, max(length - shared, 1))])
                for wait in (0, 4, 8)
            ]
            workload = serve(engine, prompts)
            for request_id in workload.requests:
                assert len(steps_of(workload, request_id)) <= 3 + math.ceil(length / chunk)


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("length", [5000, 6700])
def test_the_same_prompt_of_a_hybrid_model_hits_at_the_first_resend(serve, block_size, length):
    """Where the last chunk that may be shared ends is a state, though vLLM would keep a later one."""
    engine = replace(HYBRID, block_size=block_size)
    workload = serve(engine, [Arrival(0, [(1, length)]), Arrival(20, [(1, length)])])
    start, _ = steps_of(workload, "1")[0]
    unit = math.lcm(Method().for_blocks(block_size).query_chunk, block_size)
    assert start == (length - 64) // unit * unit


def test_no_state_is_kept_for_tokens_that_it_has_not_seen(serve):
    """vLLM keeps it for a whole block, so a step that begins inside one does not pass its end."""
    for block_size in BLOCKS:
        workload = serve(
            replace(HYBRID, block_size=block_size, budget=600), [Arrival(0, [(1, 5000)])]
        )
        for start, end in steps_of(workload, "0"):
            assert start % block_size == 0 or end <= (start // block_size + 1) * block_size


def test_prefixes_of_a_hybrid_model_that_match_inside_a_chunk_are_refused(make_vllm_config):
    engine = replace(HYBRID, block_size=512, prefix_match_unit=256)
    with pytest.raises(SettingsError, match="prefix_match_unit=256 .* anchor_layers=2"):
        start_engine(replace(engine, shares=True, query_chunk=256), make_vllm_config())
    with pytest.raises(SettingsError, match="prefix_match_unit=256 .* query_chunk to 256"):
        start_engine(engine, make_vllm_config())
    start_engine(replace(engine, query_chunk=256), make_vllm_config())


def test_a_request_without_a_step_still_counts_with_its_adapter(serve):
    """The second prompt gets no whole chunk of a step, in which one with another adapter arrives."""
    most = {"long_prefill_token_threshold": 600}
    engine = replace(LARGE, budget=1040, scheduler=most, max_loras=1)
    long_ones = [Arrival(0, [(1, 1088)]), Arrival(0, [(2, 3000)], lora=1)]
    workload = serve(engine, [*long_ones, Arrival(1, [(3, 5)], lora=2)])
    last = [whose.request_id for whose, *_ in workload.steps][-1]
    assert last == "2"
