"""What layers allocate while a model is loaded is there, or not missed, after a deep sleep."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.flash_model import FlashAttentionModel
from tests.gpu.sleeping import WeightsPool
from tests.gpu.test_attention import buffer_of
from tests.gpu.test_step import CONFIG, DEVICE, HEAD_SIZE, REASSIGNING, Graph, Layer
from tests.method.definition import rotation
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention, make_scratch
from vllm_tokenselect.gpu.flash_attention import GatheredFlashAttention, PagedFlashAttention
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.kernels.rotate.rotation import Rotation
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="plays the memory pool of vLLM on a CPU")
STEP = [(150 + 7 * i, 151 + 7 * i, 100) for i in range(4)]
ATTENTION = {
    "flash in place": lambda layer: PagedFlashAttention(FlashAttentionModel(3)),
    "flash gathered": lambda layer: GatheredFlashAttention(
        FlashAttentionModel(2), 2, buffer_of(layer)
    ),
    "sdpa": lambda layer: SdpaAttention(buffer_of(layer)),
    "own kernel": lambda layer: DecodingAttention(
        SdpaAttention(buffer_of(layer)),
        make_scratch(layer.limits, HEAD_SIZE, torch.device(DEVICE)),
    ),
}


@pytest.mark.parametrize(
    ("method", "library"),
    [*((CONFIG, library) for library in ATTENTION), (REASSIGNING, "flash gathered")],
    ids=[*ATTENTION, "positions reassigned"],
)
def test_a_step_after_a_deep_sleep_is_the_one_before(method, library):
    pool = WeightsPool()
    with pool.loading("weights"):
        layer = Layer(STEP, (6, 2), method=method)
        state = SelectionCacheState.allocate(
            8, method.selection_size, 6, HEAD_SIZE, torch.float32, torch.device(DEVICE)
        )
        turned = None
        if method.reassigns_positions:
            table = rotation().cos_sin.clone()
            turned = Rotation.from_table(table, method.max_attended, method.n_local)
        layer.cache = replace(layer.cache, selections=state, rotation=turned)
        layer.attention = ATTENTION[library](layer)
    graph = Graph(layer, num_tokens=4, queries=1)
    before = graph.replay(STEP)
    own = [layer.query, layer.kv_cache, layer.block_table, layer.cache.pages]
    assert pool.sleep_and_wake(own) > 1 << 20
    assert torch.equal(graph.replay(STEP), before)
    assert not state.owner.any()
