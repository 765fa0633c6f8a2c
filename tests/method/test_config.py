"""Settings that cannot be served are refused with one message that says what is allowed."""

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.method.settings import Method


def refusal(settings) -> str:
    with pytest.raises(SettingsError) as refused:
        TokenSelectConfig.from_additional_config({"tokenselect": settings})
    return str(refused.value)


def test_no_settings_give_the_defaults():
    config = TokenSelectConfig.from_additional_config({})
    assert (config.n_init, config.n_local, config.top_k) == (128, 512, 2048)
    assert (config.query_chunk, config.tail_queries) == (512, 64)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"topk": 1024}, "topk: there is no such setting"),
        ({"log_requests": True}, "no such setting any more; the server's /metrics counts"),
        ({"top_k": "1024"}, "top_k = '1024'"),
        ({"top_k": 10.5}, "top_k = 10.5"),
        ({"top_k": True}, "top_k = True"),
        ({"top_k": 0}, "top_k = 0"),
        ({"n_init": -1}, "n_init = -1"),
        ({"tail_queries": -5}, "tail_queries = -5"),
        ({"query_chunk": None}, "query_chunk = None"),
        ([1, 2], "must be a JSON object"),
    ],
)
def test_a_bad_value_is_named_and_everything_allowed_is_listed(settings, named):
    message = refusal(settings)
    assert named in message
    for name in TokenSelectConfig.model_fields:
        assert f"  {name}: " in message


MISPLACED = [
    ({"top_k": 300}, {"tokenselect": {"top_k": 300}}),
    ({"TOKENSELECT": {"top_k": 300}}, {"tokenselect": {"top_k": 300}}),
    ({"token_select": {"n_init": 1}}, {"tokenselect": {"n_init": 1}}),
    ({"tokenslect": {"n_init": 1}}, {"tokenselect": {"n_init": 1}}),
    ({"Token-Select": {}}, {"tokenselect": {}}),
    ({"tokenselect_top_k": 300, "theirs": 1}, {"theirs": 1, "tokenselect": {"top_k": 300}}),
    ({"queryChunk": 64, "tokenselect": {"n_init": 1}}, {"tokenselect": {"n_init": 1, "query_chunk": 64}}),
    ({"n_init": "it's"}, {"tokenselect": {"n_init": "it's"}}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "right"), MISPLACED, ids=str)
def test_a_setting_in_the_wrong_place_is_named_with_the_json_that_was_meant(given, right):
    with pytest.raises(SettingsError) as refused:
        TokenSelectConfig.from_additional_config(given)
    message = str(refused.value)
    wrong = next(iter(given))
    assert (
        f"additional_config has {{{wrong!r}: {given[wrong]!r}}} where nothing reads it" in message
    )
    command = message.partition("below the key ")[2]
    assert shlex.split(command)[-2:] == ["--additional-config", json.dumps(right)]


def test_every_setting_is_known_outside_of_its_place():
    for name in TokenSelectConfig.model_fields:
        with pytest.raises(SettingsError, match=f"has .'{name}': None. where nothing reads it"):
            TokenSelectConfig.from_additional_config({name: None})


def test_the_keys_of_other_platforms_are_left_alone():
    theirs = {"gdn_prefill_backend": "triton", "tokenizer": {"top_k": 1}, "select": 1, "tokens": 2}
    assert TokenSelectConfig.from_additional_config(theirs) == TokenSelectConfig()


@pytest.mark.parametrize(
    "given", [[1], "top_k", 5, object()], ids=lambda value: type(value).__name__
)
def test_an_additional_config_that_is_no_object_is_refused(given):
    with pytest.raises(SettingsError, match="must be a JSON object with TOKENSELECT, got"):
        TokenSelectConfig.from_additional_config(given)


def test_dense_layers_and_reassigned_positions_exclude_each_other():
    message = refusal({"dense_layers": 2, "positions": "reassigned"})
    assert "dense_layers=2 cannot be used with positions='reassigned'" in message


def test_reassigned_positions_leave_no_room_for_longer_contexts():
    assert TokenSelectConfig(positions="reassigned").method.min_context == 0
    with pytest.raises(
        SettingsError, match="min_context=4096 cannot be used with positions='reassigned'"
    ):
        TokenSelectConfig.from_mapping({"min_context": 4096, "positions": "reassigned"})


def test_generated_tokens_attend_to_everything_where_selecting_would_read_more():
    """To select reads the keys, half of the cache, and then keys and values of what is attended to."""
    method = TokenSelectConfig(top_k=1000, n_init=100, n_local=400).method
    assert method.min_context == 3000
    assert method.min_context / 2 + method.attended_before == method.min_context
    assert TokenSelectConfig(min_context=0).method.min_context == 0


def test_anchors_are_all_layers_every_nth_or_a_list():
    given = [{"anchor_layers": value} for value in ("all", 4, [6, 2, 6])]
    assert [TokenSelectConfig.from_mapping(g).method.anchor_layers for g in given] == [
        "all",
        4,
        (2, 6),
    ]
    assert [TokenSelectConfig(anchor_layers=n).method.shares_selections for n in ("all", 1, 2)] == [
        *(False, False, True)
    ]


def test_every_problem_is_reported_at_once():
    message = refusal({"top_k": -1, "n_locl": 5})
    assert "top_k = -1" in message
    assert "n_locl" in message


@pytest.mark.parametrize(
    ("engine", "hint"),
    [
        ({"max_num_batched_tokens": 512}, "--max-num-batched-tokens to at least 768"),
        ({"max_num_scheduled_tokens": 128}, "--max-num-scheduled-tokens to at least 768"),
        ({"num_drafts": 3}, "--max-num-batched-tokens to at least 1536"),
        ({"long_prefill_token_threshold": 511}, "Set it to 0 or to at least 512"),
        ({"block_size": 80, "max_num_batched_tokens": 700}, "a query chunk of 480.*at least 736"),
    ],
)
def test_settings_that_the_engine_cannot_serve_are_refused_with_what_would_fit(engine, hint):
    served = {"block_size": 128, "max_num_batched_tokens": 768, "max_num_seqs": 256}
    TokenSelectConfig().check_engine(**served)
    with pytest.raises(SettingsError, match=hint):
        TokenSelectConfig().check_engine(**{**served, **engine})


@pytest.mark.parametrize(
    ("block_size", "chunk"),
    [(16, 512), (48, 480), (512, 512), (528, 264), (1056, 352), (1152, 384), (2096, 262)],
)
def test_a_chunk_is_several_blocks_or_a_block_several_chunks(block_size, chunk):
    assert Method().for_blocks(block_size).query_chunk == chunk


@given(st.integers(1, 512).map(lambda sixteens: 16 * sixteens))
def test_chunks_that_line_up_with_blocks_are_longer_than_half_of_what_is_asked_for(block_size):
    chunk = Method().for_blocks(block_size).query_chunk
    assert 256 < chunk <= 512
    assert chunk % block_size == 0 or block_size % chunk == 0


def test_where_steps_end_with_blocks_a_step_holds_one():
    hybrid = {"steps_end_at_blocks": True, "block_size": 1024, "max_num_seqs": 16}
    TokenSelectConfig().check_engine(max_num_batched_tokens=2048, **hybrid)
    with pytest.raises(SettingsError, match=r"KV block of 1024.*at least 1040"):
        TokenSelectConfig().check_engine(max_num_batched_tokens=1030, **hybrid)


@pytest.mark.parametrize(
    ("prompt", "shareable"), [(0, 0), (64, 0), (575, 0), (576, 512), (1087, 512), (1088, 1024)]
)
def test_only_whole_chunks_before_the_tail_are_shareable(prompt, shareable):
    assert TokenSelectConfig().method.shareable_tokens(prompt) == shareable
