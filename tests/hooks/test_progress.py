"""Whatever configuration starts, every request ends within a bounded number of steps.

vLLM's real scheduler and block manager, under our rules, without a model.
"""

import dataclasses
import math

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.hooks.workload import SHORT, Arrival, Engine, Workload, start_engine
from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.method.settings import Method


def lined_up(engine: Engine) -> Method:
    """The method with the chunks that the engine's blocks leave."""
    config = TokenSelectConfig(query_chunk=engine.query_chunk, tail_queries=engine.tail_queries)
    return config.method.for_blocks(engine.block_size)


def most_steps(engine: Engine, arrivals: list[Arrival]) -> int:
    """Generous: no request shares a step with another, and each is preempted a few times."""
    steps, chunk = 0, lined_up(engine).query_chunk
    for arrival in arrivals:
        chunks = math.ceil(len(arrival.tokens) * (1 + arrival.continuations) / chunk)
        answers = arrival.max_tokens * (1 + arrival.continuations)
        steps += arrival.step + 4 * (chunks + answers + 4)
    return 20 + steps * engine.in_flight * engine.scheduler.get("prefill_schedule_interval", 1)


def check_whole_chunks(engine: Engine, workload: Workload) -> None:
    method = lined_up(engine)
    for request, start, end, starts_here in workload.steps:
        if workload.arrivals[request.request_id].continuations:
            continue  # the prompt has grown since
        tail_start = method.tail_start(request.num_prompt_tokens)
        assert end % method.query_chunk == 0 or end >= tail_start, (start, end, tail_start)
        assert not starts_here or start % method.query_chunk == 0
        if engine.shares and start < request.num_prompt_tokens > sum(SHORT.values()):
            assert end - start > 1 + engine.drafts, "a CUDA graph may replay it"
        if engine.states and engine.prefix_caching and start < request.num_prompt_tokens:
            # What vLLM keeps for a block is the state behind its last token.
            block = engine.block_size
            next_block = (start // block + 1) * block
            shared = next_block <= method.shareable_tokens(request.num_prompt_tokens)
            assert start % block == 0 or end <= next_block or not shared, (start, end)


def check_graph_contexts(engine: Engine, workload: Workload) -> None:
    """What CUDA graphs replay has no more context than the workspace holds the scores of."""
    limits = engine.graph_limits
    if limits is None:
        return
    for rows in workload.spans_by_step():
        if all(end - start <= 1 + engine.drafts for start, end in rows):
            ends_of_candidates = [
                token - limits.method.n_local for start, end in rows for token in range(start, end)
            ]
            selecting = limits.method.n_init + limits.method.top_k
            taken = [limits.width_of(end) for end in ends_of_candidates if end > selecting]
            assert sum(taken) <= limits.score_columns, rows


@st.composite
def engines(draw) -> Engine:
    chunk = draw(st.sampled_from([32, 64, 96]))
    kind = draw(st.sampled_from(["full", "sliding", "chunks", "states"]))
    seqs = draw(st.integers(1, 6))
    drafts = draw(st.sampled_from([0, 0, 1, 3, 8]))
    needed = chunk + seqs * (1 + drafts)
    step = st.integers(needed - 10, needed + 3 * chunk)
    options = {}
    for name, values in {
        "max_num_scheduled_tokens": step,
        "long_prefill_token_threshold": st.integers(chunk - 2, 2 * chunk),
        "long_prefill_token_threshold_adaptive": st.just(True),
        "max_num_active_seqs": st.integers(1, seqs),
        "policy": st.just("priority"),
        "scheduler_reserve_full_isl": st.just(False),
        "watermark": st.sampled_from([0.01, 0.2]),
        "prefill_schedule_interval": st.integers(2, 5),
    }.items():
        if draw(st.booleans()):
            options[name] = draw(values)
    asynchronous = not drafts and draw(st.booleans())
    budget = draw(step)
    if kind != "states" and draw(st.integers(0, 9)) == 0:
        options["enable_chunked_prefill"] = False
        budget = 8000
    blocks = [8, 16, 24, 32, 40, 64, 72, 88, 96, 128, 144, 176, 192, 208]
    block = draw(st.sampled_from(blocks))
    return Engine(
        query_chunk=chunk,
        tail_queries=draw(st.sampled_from([0, 1, 10, 40])),
        block_size=block,
        budget=budget,
        max_num_seqs=seqs,
        scheduler=options,
        asynchronous=asynchronous,
        in_flight=draw(st.integers(1, 2)) if asynchronous else 1,
        prefix_caching=draw(st.integers(0, 3)) > 0,
        spare_blocks=draw(st.sampled_from([0, 20, 200])),
        window=draw(st.sampled_from([40, 100])) if kind == "sliding" else 0,
        # vLLM's own layers of this kind take whole blocks.
        local_chunk=block * draw(st.integers(1, 4)) if kind == "chunks" else 0,
        states=kind == "states",
        drafts=drafts,
        max_loras=draw(st.sampled_from([0, 0, 1, 2])),
        encoder_limit=draw(st.sampled_from([0, 100, 200])),
        shares=draw(st.booleans()),
        workspace=draw(st.sampled_from([0, 0, 1, 2])),
    )


@st.composite
def arrivals(draw, engine: Engine) -> Arrival:
    text = [
        (draw(st.integers(101, 102)), draw(st.integers(0, 300))),  # what others may begin with too
        (draw(st.integers(1, 99)), draw(st.integers(1, 300))),
    ]
    images, end = [], 0
    while engine.encoder_limit and draw(st.booleans()):
        offset = end + draw(st.integers(0, 60))
        length = draw(st.integers(1, engine.encoder_limit))
        end = offset + length
        images.append((offset, length, draw(st.sampled_from("abcdefghij")) + str(length)))
    text.append((0, max(end - sum(count for _, count in text), 0)))
    return Arrival(
        step=draw(st.integers(0, 12)),
        text=text,
        max_tokens=draw(st.integers(1, 12)),
        images=images,
        lora=draw(st.integers(0, 4)) if engine.max_loras else 0,
        priority=draw(st.integers(0, 2)),
        # Where layers share selections, streams may be refused.
        continuations=0 if engine.shares else draw(st.sampled_from([0, 0, 0, 0, 2])),
    )


@st.composite
def workloads(draw) -> tuple[Engine, list[Arrival]]:
    engine = draw(engines())
    requests = draw(st.lists(arrivals(engine), min_size=1, max_size=8))
    lengths = [
        (len(request.tokens) + request.max_tokens) * (1 + request.continuations)
        for request in requests
    ]
    engine = dataclasses.replace(engine, max_model_len=max(*lengths, 256) + 1)
    if any(request.continuations for request in requests):
        # vLLM itself lets streams that wait for blocks hold on to those that they have.
        engine = dataclasses.replace(engine, spare_blocks=3 * sum(lengths))
    return engine, requests


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(workload=workloads())
def test_every_request_ends_and_no_chunk_is_split(make_vllm_config, workload):
    engine, requests = workload
    try:
        running = start_engine(engine, make_vllm_config())
    except SettingsError:
        event("refused")
        return
    event("served")
    running.run(requests, most_steps(engine, requests))
    check_whole_chunks(engine, running)
    check_graph_contexts(engine, running)


def test_who_waits_for_a_chunks_room_keeps_no_image_from_others(make_vllm_config):
    # The second and third request see one image. When the step has room for one more token, and not for a
    # chunk, the third waits. The fourth comes before it, and its image fits only without the other one.
    engine = Engine(
        query_chunk=32,
        tail_queries=0,
        block_size=8,
        budget=35,
        max_num_seqs=3,
        scheduler={"policy": "priority"},
        encoder_limit=200,
        max_model_len=257,
    )
    running = start_engine(engine, make_vllm_config())
    image = (0, 39, "seen by two")
    requests = [
        Arrival(step=0, text=[(101, 2)]),
        Arrival(step=0, text=[(102, 39)], images=[image]),
        Arrival(step=0, text=[(103, 39)], images=[image], priority=1),
        Arrival(step=1, text=[(104, 162)], images=[(0, 162, "large")]),
    ]
    running.run(requests, most_steps(engine, requests))


def test_requests_of_a_long_shared_prefix_decode_by_turns(make_vllm_config):
    # All have their place in the KV cache, since they share a prefix. The workspace holds two of them.
    engine = Engine(max_model_len=1024, budget=600, workspace=2, max_num_seqs=5, spare_blocks=40)
    running = start_engine(engine, make_vllm_config())
    requests = [Arrival(step=6 * n, text=[(101, 900), (n, 60)], max_tokens=30) for n in range(1, 6)]
    running.run(requests, most_steps(engine, requests))
    check_graph_contexts(engine, running)
    steps = running.spans_by_step()
    decoding = [step for step in steps if step and all(end - start == 1 for start, end in step)]
    assert max(len(step) for step in decoding) == 2
    assert not any(request.num_preemptions for request in running.requests.values())
