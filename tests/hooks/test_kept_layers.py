"""What a layer on a CPU keeps from step to step is that of its cache, rotation and role of today."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm_tokenselect.backend.cpu_impl import CpuTokenSelectImpl
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.cpu.layer import CpuLayer
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.anchors import Role

SLOTS = torch.tensor([17])


@pytest.fixture
def impl() -> CpuTokenSelectImpl:
    """A layer as it stands after its model was made."""
    layer = object.__new__(CpuTokenSelectImpl)
    layer.config = TokenSelectConfig()
    layer.head_size, layer.scale, layer.dtype = 8, 0.5, torch.float32
    layer.logits_soft_cap, layer.sinks = 0.0, torch.nn.Parameter(torch.zeros(4).bfloat16())
    layer.selections = SelectionCacheState.allocate(1, 4, 4, 8, torch.float32, torch.device("cpu"))
    layer.reassigns_positions, layer.rotation = False, None
    layer.follows, layer.followers = Role()
    layer._kept = None
    return layer


def new_cache() -> torch.Tensor:
    return torch.zeros(3, 2, 16, 2 * 8)


def test_a_layer_is_kept_while_its_cache_stays_where_it_is(impl):
    cache = new_cache()
    assert impl._layer(cache) is impl._layer(cache)


@pytest.mark.parametrize("moved", ["another tensor", "the same tensor elsewhere"])
def test_tokens_are_written_to_the_cache_of_today(impl, moved):
    first = new_cache()
    tokens = torch.ones(1, 2, 8)
    impl.do_kv_cache_update(None, tokens, tokens, first, SLOTS)
    second, was = first, first.clone()
    if moved == "another tensor":
        second = new_cache()
    else:
        second.data = new_cache()
    impl.do_kv_cache_update(None, tokens * 2, tokens * 3, second, SLOTS)
    assert second.sum() == was.sum() * 2.5
    assert second.view(3, 2, 2, 16, 8)[1, :, :, 1].unique().tolist() == [2, 3]


def test_a_role_and_a_rotation_that_come_later_are_known(impl):
    cache = new_cache()
    kept = impl._layer(cache)
    impl.take_role(Role(follows=True))
    follows = impl._layer(cache)
    assert kept.cache.selections is not None
    assert follows.cache.follows
    assert follows.cache.selections is None
    impl.take_rotation(torch.ones(4096, 8))
    rotates = impl._layer(cache).cache
    assert rotates.follows
    assert rotates.rotation is impl.rotation is not None


def test_sinks_that_are_loaded_later_are_known(impl):
    layer: CpuLayer = impl._layer(new_cache())
    with torch.no_grad():
        impl.sinks.copy_(torch.arange(4.0))
    assert layer.arrays()[-3].tolist() == [0, 1, 2, 3]
