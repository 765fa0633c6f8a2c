"""Layers get their roles when the model is made, and only layers of one KV cache share selections."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.anchors import count_anchors, refuse_to_share, settle_anchors
from vllm_tokenselect.method.anchors import Role
from vllm_tokenselect.method.settings import SettingsError

CONFIG = TokenSelectConfig(anchor_layers=2)
NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(12)]


class Impl:
    took_role = False
    follows = False

    def take_role(self, role: Role) -> None:
        self.took_role, self.follows, self.followers = True, *role


def made(names: list[str]) -> tuple[dict[str, Any], Any]:
    """Layers of a model, and an engine's configuration that knows them beside one without roles."""
    layers = {name: SimpleNamespace(impl=Impl()) for name in names}
    context = {"model.layers.0.mamba": SimpleNamespace(), **layers}
    compilation = SimpleNamespace(static_forward_context=context)
    return layers, SimpleNamespace(compilation_config=compilation)


def test_every_layer_of_a_stage_gets_its_role_and_its_first_is_an_anchor():
    """The second of two stages: layers 7 to 11."""
    layers, engine = made(NAMES[7:])
    assert settle_anchors(layers, [NAMES[:7], NAMES[7:]], CONFIG) == [0, 2, 4, 6, 7, 8, 10]
    roles = [(layer.impl.follows, layer.impl.followers) for layer in layers.values()]
    assert roles == [(False, 0), (False, 1), (True, 0), (False, 1), (True, 0)]
    assert count_anchors(NAMES[7:], engine) == 3
    refuse_to_share(NAMES[7:], engine, CONFIG)


def test_layers_of_several_kv_caches_are_refused():
    layers, engine = made(NAMES)
    settle_anchors(layers, [NAMES], CONFIG)
    with pytest.raises(
        SettingsError, match=r"layers\.1\.self_attn.*apart from.*layers\.0\.self_attn"
    ):
        refuse_to_share(NAMES[::2], engine, CONFIG)
    refuse_to_share(NAMES[::2], engine, TokenSelectConfig())


def test_a_loader_that_gives_no_roles_is_refused():
    _, engine = made(NAMES)
    with pytest.raises(SettingsError, match="--load-format"):
        refuse_to_share(NAMES, engine, CONFIG)
    refuse_to_share(NAMES, engine, TokenSelectConfig())
