"""A server's start says which settings are in force, where they come from, and when nothing is selected."""

import pickle
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_tokenselect.hooks.start_log import describe_start, why_nothing_selects
from vllm_tokenselect.profiles import ProfileSettings

LAYERS = "layer 0: CPU_ATTN (dense_layers 1); layers 1-3: TOKENSELECT"


@pytest.fixture
def said(make_vllm_config):
    """What a server with some settings says."""

    def say(settings: dict, ways: tuple[str, ...] = ("flash",)) -> str:
        config = make_vllm_config()
        config.additional_config = {"tokenselect": settings}
        impls = [SimpleNamespace(attends_with=way) for way in ways]
        return describe_start(config, LAYERS, 3, 4, impls, anchors=[1, 3])

    return say


def test_settings_that_are_not_the_defaults_are_marked(said):
    text = said({"top_k": 96, "vote": "local", "min_context": 0})
    assert "top_k *96, n_init 128" in text
    assert "min_context *0, vote local" in text
    assert f"layers that select: 3 of 4 ({LAYERS})" in text
    assert "generated tokens select in the layers 1, 3;" in text


def test_settings_remember_their_profile_in_the_processes_that_they_are_sent_to(said):
    settings = ProfileSettings({"top_k": 96}, "the profile found.json for tiny of 2026-11-29")
    sent = pickle.loads(pickle.dumps({"tokenselect": settings}))["tokenselect"]
    assert sent == {"top_k": 96}
    assert "profile: the profile found.json for tiny of 2026-11-29" in said(sent)
    assert "profile: none" in said({"top_k": 96})


def test_layers_of_different_shapes_name_each_way_to_attend_once(said):
    assert "attends with flash; sdpa" in said({}, ("sdpa", "flash", "sdpa"))


def test_a_server_too_short_to_select_anything_says_so(make_vllm_config):
    config = make_vllm_config()  # contexts of 4,096 tokens
    config.additional_config = {"tokenselect": {"top_k": 4096 - 128 - 512 - 2}}
    assert why_nothing_selects(config) == ""
    config.additional_config["tokenselect"]["top_k"] += 1
    assert "contexts of up to 4096 tokens are attended in full" in why_nothing_selects(config)
