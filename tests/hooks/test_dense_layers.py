"""Dense layers: which they are, and where there cannot be any. `tests/server/` serves some."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from torch import nn

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine import dense_layers
from vllm_tokenselect.hooks import engine_config, layer_backends
from vllm_tokenselect.hooks.registration import backend_member
from vllm_tokenselect.method.settings import SettingsError

FIRST_TWO = TokenSelectConfig(dense_layers=2)
NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(4)]


def test_they_are_the_first_of_the_whole_model():
    assert [dense_layers.is_dense(name, FIRST_TWO) for name in NAMES] == [True, True, False, False]
    assert not any(dense_layers.is_dense(name, TokenSelectConfig()) for name in NAMES)


def test_a_layer_that_selects_though_it_is_to_be_dense_stops_the_server():
    """As where a loader does not call the function that the hook wraps."""
    dense_layers.refuse_selecting(NAMES[2:], FIRST_TWO)
    with pytest.raises(SettingsError, match=r"--load-format.*model\.layers\.1\.self_attn\.attn"):
        dense_layers.refuse_selecting(NAMES[1:], FIRST_TWO)


def test_a_layer_that_selects_cannot_read_the_keys_of_a_dense_one():
    """The last two of four layers read what the second one has written."""
    targets = (None, None, NAMES[1], NAMES[1])
    layers = {
        name: SimpleNamespace(kv_sharing_target_layer_name=target)
        for name, target in zip(NAMES, targets, strict=True)
    }
    dense_layers.refuse_to_part(layers, TokenSelectConfig(dense_layers=1))
    with pytest.raises(
        SettingsError, match=r"layer [23] selects .* layer 1.* Set it to at most 1\."
    ):
        dense_layers.refuse_to_part(layers, FIRST_TWO)
    dense_layers.refuse_to_part(layers, TokenSelectConfig(dense_layers=4))


@pytest.fixture
def configure(make_vllm_config):
    def run(**settings: int) -> None:
        config = make_vllm_config()
        config.attention_config.backend = backend_member()
        own = config.additional_config["tokenselect"]
        config.additional_config = {"tokenselect": {**own, **settings}}
        engine_config.configure(config, "cpu")

    return run


def test_a_model_without_a_layer_that_selects_is_refused(configure):
    configure(dense_layers=0)
    with pytest.raises(SettingsError, match="leaves no layer of .* Set it to at most 0"):
        configure(dense_layers=1)


def test_a_quantized_cache_is_refused(make_vllm_config):
    config = make_vllm_config()
    model = SimpleNamespace(model="m", get_total_num_hidden_layers=lambda: 3)
    dense_layers.check_model(model, config.cache_config, FIRST_TWO)
    config.cache_config.cache_dtype = "fp8"
    with pytest.raises(SettingsError, match="--kv-cache-dtype fp8"):
        dense_layers.check_model(model, config.cache_config, FIRST_TWO)
    dense_layers.check_model(model, config.cache_config, TokenSelectConfig())


def test_another_engine_of_the_process_is_left_alone_with_its_settings(make_vllm_config):
    config = make_vllm_config()
    config.additional_config = {"tokenselect": {"no such": "setting"}}
    layer_backends.settle_layers(nn.Linear(1, 1), config)
    config.attention_config.backend = backend_member()
    with pytest.raises(SettingsError, match="no such"):
        layer_backends.settle_layers(nn.Linear(1, 1), config)
