"""What a request may ask for itself, and what must not share cached blocks because of it."""

import dataclasses

import pytest

from vllm_tokenselect.method.request_settings import fingerprint, requested_top_k
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method, SettingsError

SERVER = 2048


@pytest.mark.parametrize(
    ("extra_args", "top_k"),
    [
        (None, SERVER),
        ({}, SERVER),
        ({"tokenselect": "on"}, SERVER),
        ({"tokenselect": "off"}, FULL_ATTENTION),
        ({"tokenselect_top_k": 1}, 1),
        ({"tokenselect_top_k": SERVER}, SERVER),
        ({"tokenselect": "on", "tokenselect_top_k": 7}, 7),
        ({"kv_transfer_params": {}, "top_k": "not ours", "token_detect": 1, "tokens": 2}, SERVER),
    ],
)
def test_a_request_selects_what_it_asks_for_or_what_the_server_does(extra_args, top_k):
    assert requested_top_k(extra_args, SERVER) == top_k


@pytest.mark.parametrize(
    ("extra_args", "named"),
    [
        ({"tokenselect": "of"}, "tokenselect='of'"),
        ({"tokenselect": 0}, "tokenselect=0"),
        ({"tokenselect": ["off"]}, r"tokenselect=\['off'\]"),
        ({"tokenselect_top_k": 0}, "tokenselect_top_k=0"),
        ({"tokenselect_top_k": SERVER + 1}, "tokenselect_top_k=2049"),
        ({"tokenselect_top_k": "512"}, "tokenselect_top_k='512'"),
        ({"tokenselect_top_k": 512.0}, "tokenselect_top_k=512.0"),
        ({"tokenselect_top_k": True}, "tokenselect_top_k=True"),
        ({"tokenselect_top_k": [512]}, r"tokenselect_top_k=\[512\]"),
        ({"tokenselect_topk": 512}, "no extra argument 'tokenselect_topk'"),
        ({"top_k_tokenselect": 512}, "no extra argument 'top_k_tokenselect'"),
        ({"TOKENSELECT": "off"}, "no extra argument 'TOKENSELECT'"),
        ({"Tokenselect_Top_K": 512}, "no extra argument 'Tokenselect_Top_K'"),
        ({"token_select": "off"}, "no extra argument 'token_select'"),
        ({"tokenslect": "off"}, "no extra argument 'tokenslect'"),
        ({"tokenselect": True}, "tokenselect=True"),
        ({"tokenselect": "OFF"}, "tokenselect='OFF'"),
        ({"tokenselect": "off", "tokenselect_top_k": 7}, "exclude each other"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_can(extra_args, named):
    with pytest.raises(SettingsError, match=named) as refused:
        requested_top_k(extra_args, SERVER)
    assert 'tokenselect is "on" or "off"' in str(refused.value)
    assert "an integer from 1 to this server's 2048" in str(refused.value)


def test_a_fingerprint_can_be_read():
    settings = (
        "top_k=1024,n_init=128,n_local=512,query_chunk=512,block_size=16,dense_layers=0,"
        "positions=native,voters=1"
    )
    assert fingerprint(Method(), 1024, block_size=16) == f"v1:{settings}"
    assert fingerprint(Method(), FULL_ATTENTION) == "v1:off"


# Of the settings, those that what is shared does not depend on.
UNSHARED = {"tail_queries", "similarity_threshold", "refresh_interval", "min_context"}
OTHER = {"positions": "reassigned", "vote": "global", "anchor_layers": 2}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Method)])
def test_a_fingerprint_tells_every_setting_that_a_shared_block_depends_on(name):
    default = Method()
    other = OTHER[name] if name in OTHER else getattr(default, name) + 1
    changed = dataclasses.replace(default, **{name: other})
    ranks = 2
    same = fingerprint(changed, changed.top_k, ranks) == fingerprint(default, default.top_k, ranks)
    assert same == (name in UNSHARED)


def test_a_fingerprint_tells_the_block_size():
    assert fingerprint(Method(), 1024, 1, 528) != fingerprint(Method(), 1024, 1, 544)


def test_ranks_that_vote_together_share_blocks_with_one_that_has_all_heads():
    together, apart = Method(vote="global"), Method(vote="local")
    assert fingerprint(together, 1024, 4) == fingerprint(together, 1024)
    assert fingerprint(apart, 1024, 4) != fingerprint(apart, 1024)
    assert fingerprint(apart, 1024) == fingerprint(together, 1024)
