"""With a KV connector, too, a request reads what it would have computed itself, whatever comes when."""

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.hooks.transfers import Connected
from tests.hooks.workload import Arrival, Engine, start_engine
from vllm_tokenselect.config import SettingsError


@st.composite
def engines(draw, kinds=("full", "full", "sliding", "states"), asynchronous=True) -> Engine:
    chunk = draw(st.sampled_from([32, 64, 96]))
    kind = draw(st.sampled_from(kinds))
    seqs = draw(st.integers(1, 5))
    later = asynchronous and draw(st.booleans())
    drafts = 0 if later or kind == "states" else draw(st.sampled_from([0, 0, 3]))
    return Engine(
        query_chunk=chunk,
        tail_queries=draw(st.sampled_from([0, 1, 10, 40])),
        block_size=draw(st.sampled_from([8, 16, 32, 40, 64, 96, 128])),
        budget=chunk + seqs * (1 + drafts) + draw(st.integers(0, 3 * chunk)),
        max_num_seqs=seqs,
        asynchronous=later,
        in_flight=draw(st.integers(1, 2)) if later else 1,
        spare_blocks=draw(st.sampled_from([0, 0, 20, 200])),
        window=draw(st.sampled_from([40, 100])) if kind == "sliding" else 0,
        states=kind == "states",
        prefix_caching=kind == "states" or draw(st.booleans()),  # vLLM insists
        drafts=drafts,
        heads=drafts > 0 and draw(st.booleans()),
        max_model_len=660,
    )


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 60),
        text=st.tuples(
            st.tuples(st.just(101), st.sampled_from([0, 100, 200, 290, 400])),
            st.tuples(
                st.integers(1, 2), st.one_of(st.integers(1, 200), st.sampled_from([1, 60, 180]))
            ),
        ),
        max_tokens=st.integers(1, 12),
    ),
    min_size=3,
    max_size=12,
)
RANDOM = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def serve(make_vllm_config, engine, arrivals, kind=Connected, **options) -> Connected | None:
    try:
        running = start_engine(engine, make_vllm_config(), kind, **options)
    except SettingsError:
        event("refused")
        return None
    running.run(arrivals, 4000)
    event("loaded" if running.loaded else "loaded nothing")
    return running


@RANDOM
@given(engine=engines(), arrivals=ARRIVALS, seed=st.integers(0, 999))
def test_what_vllms_offloading_loads_is_what_the_request_would_have_computed(
    make_vllm_config, engine, arrivals, seed
):
    serve(make_vllm_config, engine, arrivals, seed=seed)


# vLLM does not stop an asynchronous scheduler from going on with what a load at once has lost.
AT_ONCE = st.tuples(
    engines(("full",), asynchronous=False), st.sampled_from([["now"], ["now", "later"]])
)
BETWEEN_STEPS = st.tuples(engines(("full", "sliding")), st.just(["later"]))


@RANDOM
@given(
    kind=st.one_of(AT_ONCE, BETWEEN_STEPS),
    arrivals=ARRIVALS,
    seed=st.integers(0, 999),
    loses=st.booleans(),
    policy=st.sampled_from(["recompute", "recompute", "fail"]),
)
def test_a_connector_may_promise_any_number_of_tokens_and_lose_them(
    make_vllm_config, kind, arrivals, seed, loses, policy
):
    engine, modes = kind
    extra = {"seed": seed, "modes": modes, "loses": loses}
    options = {"connector": "Losing", "extra": extra, "seed": seed, "policy": policy}
    running = serve(make_vllm_config, engine, arrivals, **options)
    if running is not None and not (loses and policy == "fail"):
        assert not [end for end in running.ends.values() if end.finish_reason.name == "ERROR"]
