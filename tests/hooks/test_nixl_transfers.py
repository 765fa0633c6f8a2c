"""What a server reads of another one through NIXL is what it would have computed, or is not read."""

import copy
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from hypothesis import event, given
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.hooks.handed_over import Linked, serve_apart
from tests.hooks.test_connectors import ARRIVALS, RANDOM, engines
from tests.hooks.workload import Arrival, Engine, start_engine
from vllm_tokenselect.config import SettingsError

ARRIVAL = Arrival(0, ((101, 300), (1, 80)), max_tokens=6)
ENGINE = Engine(max_model_len=660, budget=200, spare_blocks=100)


def start(make_vllm_config, engine: Engine, **options) -> Linked | None:
    extra = {"loses": options.pop("loses", False)}
    try:
        return start_engine(
            engine,
            make_vllm_config(),
            Linked,
            connector="NixlConnector",
            extra=extra,
            **options,
        )
    except SettingsError:
        return None


@RANDOM
@given(
    engine=engines(("full",)),
    arrivals=ARRIVALS,
    seed=st.integers(0, 999),
    loses=st.booleans(),
    others=st.sets(st.integers(0, 11)),
)
def test_what_is_read_of_another_server_is_what_the_request_would_have_computed(
    make_vllm_config, engine, arrivals, seed, loses, others
):
    # Blocks are kept until they are read, and a reader may read late.
    prefill = start(make_vllm_config, replace(engine, spare_blocks=600), seed=seed)
    decode = start(make_vllm_config, engine, seed=seed, loses=loses)
    if prefill is None or decode is None:
        event("refused")
        return
    serve_apart(prefill, decode, arrivals, sorted(others))
    event("loaded" if decode.loaded else "loaded nothing")
    assert not [end for end in decode.ends.values() if end.finish_reason.name == "ERROR"]


def loaded(make_vllm_config, arrivals, decode_engine=ENGINE, others=()) -> int:
    prefill = start(make_vllm_config, ENGINE)
    decode = start(make_vllm_config, decode_engine)
    serve_apart(prefill, decode, arrivals, others)
    return decode.loaded


def test_a_prompt_is_read_up_to_the_last_whole_chunk_before_its_end(make_vllm_config):
    assert loaded(make_vllm_config, [ARRIVAL]) == 320  # five chunks of 64; 370 is its limit


@pytest.mark.parametrize(
    "other",
    [
        replace(ARRIVAL, text=((101, 300), (2, 80))),
        replace(ARRIVAL, lora=1),
        replace(ARRIVAL, images=((0, 30, "image"),)),
    ],
    ids=["tokens", "adapter", "image"],
)
def test_another_prompt_reads_nothing_and_is_computed(make_vllm_config, other):
    engine = replace(ENGINE, max_loras=2, encoder_limit=64)
    prefill, decode = (start(make_vllm_config, engine) for _ in range(2))
    serve_apart(prefill, decode, [ARRIVAL, other], others=[0, 1])
    assert decode.loaded == 0
    assert {end.finish_reason.name for end in decode.ends.values()} == {"LENGTH"}


@pytest.mark.parametrize("setting", [{"query_chunk": 32}, {"tail_queries": 11}, {"block_size": 32}])
def test_a_server_of_other_settings_reads_nothing(make_vllm_config, setting):
    assert loaded(make_vllm_config, [ARRIVAL], replace(ENGINE, **setting)) == 0


def test_what_a_decoding_server_offers_back_is_not_read(make_vllm_config):
    prefill = start(make_vllm_config, ENGINE)
    address = dict.fromkeys(("remote_engine_id", "remote_request_id", "remote_host"), "other")
    back = {"do_remote_decode": True, "remote_block_ids": [[1] * 20], "remote_num_tokens": 300}
    request = prefill.add(replace(ARRIVAL, transfer=address | back | {"remote_port": 1}))
    prefill.step()
    assert request.status == RequestStatus.RUNNING, "it would wait for what it reads"


MALFORMED = {
    "no blocks": {"remote_block_ids": None},
    "a number": {"remote_block_ids": 7},
    "no groups": {"remote_block_ids": [7]},
    "names": {"remote_block_ids": [["7"] * 40]},
    "two groups": {"remote_block_ids": [[7] * 40, [7] * 40]},
    "no host": {"remote_host": None},
}


@pytest.mark.parametrize("wrong", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_an_offer_is_left_alone_and_the_prompt_computed(make_vllm_config, wrong):
    prefill, decode = start(make_vllm_config, ENGINE), start(make_vllm_config, ENGINE)
    asked = prefill.add(replace(ARRIVAL, max_tokens=1, transfer={"do_remote_decode": True}))
    while prefill.unfinished():
        prefill.step()
    offer = {**prefill.ends[asked.request_id].kv_transfer_params, **wrong}
    decode.run([replace(ARRIVAL, transfer=offer)], 100)
    assert decode.worker.asked == 0, "a worker would fail on it"
    assert decode.ends["0"].finish_reason.name == "LENGTH"


@pytest.mark.parametrize("layers", [{"window": 40}, {"states": True}])
def test_a_model_with_windows_or_states_is_refused(make_vllm_config, layers):
    with pytest.raises(SettingsError, match="NixlConnector cannot be used with this model, "):
        start_engine(
            replace(ENGINE, **layers),
            copy.copy(make_vllm_config()),
            Linked,
            connector="NixlConnector",
        )
