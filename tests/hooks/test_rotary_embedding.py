"""What a layer rotates in the model's stead is what the model's rotary embedding would have."""

import copy

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn
from vllm.config import MultiModalConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

from vllm_tokenselect.backend.cpu_impl import CpuTokenSelectImpl
from vllm_tokenselect.hooks.rotary_kinds import (
    AttentionLayer,
    Unrotated,
    extend_table,
    rotate_alike,
    table_of,
    unusable,
)
from vllm_tokenselect.kernels.rotate.reference import rotate
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.method.settings import SettingsError

HEAD_SIZE, TOKENS, N_LOCAL = 32, 40, 7

KINDS = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, alpha": {"rope_type": "dynamic", "alpha": 3.0},
    "ntk": {"rope_type": "ntk", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "M-RoPE": {"mrope_section": [8, 4, 4]},
    "M-RoPE, interleaved": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": ORIGINAL,
}


@pytest.fixture
def make_rope(make_vllm_config):
    def make(kind: str, neox: bool, max_position: int = 128):
        parameters = {"rope_type": "default", "rope_theta": 100.0, **KINDS[kind]}
        with set_current_vllm_config(make_vllm_config()):
            return get_rope(HEAD_SIZE, max_position, neox, parameters, torch.float32)

    return make


def vectors(heads: int) -> torch.Tensor:
    return torch.randn(TOKENS, heads, HEAD_SIZE, generator=torch.Generator().manual_seed(heads))


def products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    query, key = (x.view(TOKENS, -1, HEAD_SIZE) for x in (query, key))
    return torch.einsum("nhd,mkd->hknm", query, key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
def test_queries_and_keys_rotated_later_have_the_same_products(make_rope, kind, neox):
    rope, query, key = make_rope(kind, neox), vectors(3), vectors(2)
    flat = (x.reshape(TOKENS, -1) for x in (query, key))
    rotated = rope.forward_native(torch.arange(TOKENS), *(x.clone() for x in flat))
    rotation = Rotation.from_table(rope.cos_sin_cache, TOKENS, N_LOCAL)
    later = Unrotated(rope)(torch.zeros(TOKENS), query, key)
    assert all(x.shape == y.shape for x, y in zip(later, (query, key), strict=True))
    ours = products(*(rotate(x, rotation.cos_sin) for x in later))
    torch.testing.assert_close(ours, products(*rotated), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_that_votes_stands_n_local_tokens_behind_every_key(make_rope, kind):
    rope, query, key = make_rope(kind, True), vectors(3), vectors(2)
    rotation = Rotation.from_table(rope.cos_sin_cache, TOKENS, N_LOCAL)
    at = (torch.full((TOKENS,), position) for position in (N_LOCAL, 0))
    flat = (x.reshape(TOKENS, -1).clone() for x in (query, key))
    rotated = [rope.forward_native(p, x, x)[0] for p, x in zip(at, flat, strict=True)]
    voting = rotate(query, rotation.vote[None])
    torch.testing.assert_close(products(voting, key), products(*rotated), rtol=1e-4, atol=1e-3)


def test_queries_that_come_without_keys_are_left_unrotated_too(make_rope):
    """As of a layer that reads the keys of another one."""
    rope, query = make_rope("default", False), vectors(3)
    alone, no_key = Unrotated(rope)(torch.zeros(TOKENS), query, None)
    assert no_key is None
    assert torch.equal(alone, Unrotated(rope)(torch.zeros(TOKENS), query, vectors(2))[0])


def test_layersrotate_alike_only_with_equal_tables_and_pairs(make_rope):
    """A layer may reassign positions of another's keys only if it rotates as that one does."""
    rope = make_rope("yarn", True)
    assert rotate_alike(rope, copy.deepcopy(rope))
    for other in (make_rope("default", True), make_rope("yarn", False), None):
        assert not rotate_alike(rope, other)


@pytest.mark.parametrize("kind", ["M-RoPE", "M-RoPE, interleaved"])
def test_in_text_the_dimensions_of_a_position_are_one(make_rope, make_vllm_config, kind):
    """So an order of tokens gives them, where no image can come."""
    rope, query, key = make_rope(kind, True), vectors(3).flatten(1), vectors(2).flatten(1)
    positions = torch.arange(TOKENS)
    one = rope.forward_native(positions, query, key)
    three = rope.forward_native(positions.expand(3, -1), query, key)
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))
    model = copy.copy(make_vllm_config().model_config)
    model.multimodal_config = None
    assert unusable(rope, model) is None
    model.multimodal_config = MultiModalConfig()
    assert "--language-model-only" in unusable(rope, model)
    model.multimodal_config = MultiModalConfig(language_model_only=True)
    assert unusable(rope, model) is None


@pytest.mark.parametrize(
    ("max_model_len", "max_attended", "factors"),
    [(ORIGINAL, 100, "short"), (500, ORIGINAL, "short"), (500, ORIGINAL + 1, "long")],
)
def test_longrope_has_the_factors_of_the_most_tokens_that_are_attended_to(
    make_vllm_config, max_model_len, max_attended, factors
):
    """As in a model that is served with a context of so many tokens."""

    def make(longest):
        vllm_config = copy.copy(make_vllm_config())
        vllm_config.model_config = copy.copy(vllm_config.model_config)
        vllm_config.model_config.max_model_len = longest
        _ROPE_DICT.clear()  # the context is no part of its keys
        parameters = {"rope_theta": 100.0, **LONGROPE}
        with set_current_vllm_config(vllm_config):
            return get_rope(HEAD_SIZE, 512, True, parameters, torch.float32), vllm_config

    table = table_of(*make(max_model_len), max_attended)
    query, key = vectors(3), vectors(2)
    rope, _ = make(ORIGINAL if factors == "short" else ORIGINAL + 1)
    wanted = rope(torch.arange(TOKENS), query.flatten(1), key.flatten(1))
    rotation = Rotation.from_table(table, max_attended, N_LOCAL)
    for x, y in zip((query, key), wanted, strict=True):
        torch.testing.assert_close(rotate(x, rotation.cos_sin[:TOKENS]).flatten(1), y)


def test_a_table_shorter_than_what_is_attended_is_told():
    with pytest.raises(ValueError, match="has 40 positions of 41 needed"):
        Rotation.from_table(torch.zeros(40, HEAD_SIZE), 41, N_LOCAL)


def layer_with(rope) -> AttentionLayer:
    owner = nn.Module()
    owner.rotary_emb, owner.attn = rope, nn.Module()
    owner.attn.impl = object()
    return AttentionLayer("model.layers.3.self_attn.attn", owner.attn, owner)


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_a_table_made_longer_is_one_that_was_long_from_the_start(make_rope, kind):
    rope, long = make_rope(kind, True, 96), make_rope(kind, True, 500)
    extend_table(layer_with(rope), 500)
    assert torch.equal(rope.cos_sin_cache, long.cos_sin_cache)


def test_a_table_that_cannot_be_made_longer_names_the_layer_and_the_limit(make_rope):
    with pytest.raises(SettingsError, match="layers.3.*DynamicNTK.*Set --max-model-len to 96"):
        extend_table(layer_with(make_rope("dynamic", True, 96)), 500)


class Unprepared(CpuTokenSelectImpl):
    """An implementation as vLLM makes it, which compiles and allocates nothing."""

    def prepare(self, vllm_config):
        pass


@pytest.fixture
def make_impl(make_vllm_config):
    def make(positions: str) -> Unprepared:
        vllm_config = make_vllm_config()
        vllm_config.additional_config = {"tokenselect": {"positions": positions}}
        with set_current_vllm_config(vllm_config):
            return Unprepared(2, HEAD_SIZE, 1.0, 1, None, None, "auto")

    return make


def test_only_layers_that_reassign_positions_lose_their_rotation(make_impl):
    """A vLLM with the diff asks this of every model, and so does a process that served one before."""
    layer = layer_with(nn.Module())
    assert not layer.reassigns, "a layer of another backend"
    for positions in ("native", "reassigned"):
        layer.attention.impl = make_impl(positions)
        assert layer.reassigns == (positions == "reassigned")


def test_a_layer_without_positions_rotates_nothing_and_one_that_was_forgotten_is_told(make_impl):
    forgotten, without = make_impl("reassigned"), make_impl("reassigned")
    without.take_rotation(None)
    assert without.layer_rotation() is None
    with pytest.raises(SettingsError, match="load-format"):
        forgotten.layer_rotation()
    assert make_impl("native").layer_rotation() is None
