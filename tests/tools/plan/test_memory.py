"""Predicted bytes are those of buffers that are really allocated, and they add up."""

import dataclasses

import pytest
import torch

from tests.tools.plan.sized import server, tiny_model
from vllm_tokenselect.gpu import attention
from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.decoding_attention import make_scratch
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.tools.plan.layouts import Layout, cut_stages
from vllm_tokenselect.tools.plan.memory import RankShape, gpu_memory, step_limits
from vllm_tokenselect.tools.plan.planned_server import BLOCK_SIZE, find_gpu

ALONE = Layout(1, 1, 1)
CPU = torch.device("cpu")


def memory_of(model, asked, layout=ALONE):
    return [gpu_memory(model, asked, layout, s) for s in cut_stages(model.layers, layout.pp)]


def stored_bytes(*holders: object) -> int:
    """Of all tensors that the objects hold, each memory once."""
    tensors = [t for h in holders for t in vars(h).values() if isinstance(t, torch.Tensor)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


SETTINGS = {
    "native": {},
    "reassigned": {"positions": "reassigned"},
    "shared": {"anchor_layers": 2},
    "few scores": {"workspace_mb": 1, "top_k": 64},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_predicted_bytes_are_those_of_buffers_on_a_real_device(tmp_path, monkeypatch, name, tp):
    monkeypatch.setattr(attention, "GATHER_BYTES", 8 << 20)
    model, asked = tiny_model(tmp_path), server(settings=SETTINGS[name])
    rank = RankShape.of(model, tp)
    (memory,) = memory_of(model, asked, Layout(tp, 1, 1))
    limits, method = step_limits(asked, rank), asked.config.method
    workspace = Workspace(limits, rank.head_size, CPU, torch.zeros(0), dtype=asked.dtype)
    buffers = memory.buffers
    allocated = stored_bytes(workspace, workspace.table_scratch, workspace.kept)
    assert buffers.workspace + buffers.sparse_block_table == allocated
    layers = [
        SelectionCacheState.allocate(
            asked.max_num_seqs,
            method.selection_size,
            rank.num_heads,
            rank.head_size,
            asked.dtype,
            CPU,
        )
        for _ in model.layers
    ]
    assert buffers.selection_cache == stored_bytes(*layers)
    gathered = GatherBuffer(rank.num_kv_heads, rank.head_size, asked.dtype, limits.table_width, CPU)
    assert buffers.gather_buffer == (stored_bytes(gathered) if name == "reassigned" else 0)
    assert buffers.partial_outputs == stored_bytes(make_scratch(limits, rank.head_size, CPU))


def test_memory_adds_up_to_what_may_be_used(tmp_path):
    model, asked = tiny_model(tmp_path), server(max_num_seqs=500)
    (memory,) = memory_of(model, asked)
    parts = dataclasses.asdict(memory.buffers).values()
    assert memory.left + sum(parts) == memory.usable == int(asked.gpu.memory * 0.9)
    assert memory.kv_context == memory.kv_token * asked.context
    fits = memory.num_contexts(10**9)
    assert fits * memory.kv_context <= memory.left < (fits + 1) * memory.kv_context
    assert memory.num_contexts(500) == 500
    assert memory.missing == 0


def test_the_kv_cache_stops_shrinking_past_the_number_of_kv_heads(tmp_path):
    model, asked = tiny_model(tmp_path), server()
    contexts = [memory_of(model, asked, Layout(tp, 1, 1))[0].kv_context for tp in (1, 2, 4, 8)]
    assert contexts == [contexts[0], contexts[0] // 2, contexts[0] // 2, contexts[0] // 2]


def test_gpus_past_the_number_of_kv_heads_hold_their_weights_again(tmp_path):
    model, asked = tiny_model(tmp_path), server()

    def all_gpus(tp: int) -> int:
        return tp * memory_of(model, asked, Layout(tp, 1, 1))[0].buffers.weights

    vectors = 2 * (sum(layer.vectors for layer in model.layers) + model.final)
    assert all_gpus(1) == 2 * model.num_weights
    assert all_gpus(2) == 2 * model.num_weights + vectors
    assert all_gpus(4) == 2 * model.num_weights + 3 * vectors + 2 * 6 * model.kv_matrices


def test_stages_share_weights_cache_and_state_and_each_has_its_own_workspace(tmp_path):
    model, asked = tiny_model(tmp_path), server()
    (whole,) = memory_of(model, asked)
    stages = memory_of(model, asked, Layout(1, 3, 1))
    for name in ("weights", "selection_cache"):
        assert sum(getattr(s.buffers, name) for s in stages) == getattr(whole.buffers, name)
    assert sum(s.kv_context for s in stages) == whole.kv_context
    assert {s.buffers.workspace for s in stages} == {whole.buffers.workspace}
    assert stages[0].buffers.weights > stages[1].buffers.weights < stages[2].buffers.weights


def test_tied_embeddings_lie_in_the_first_and_in_the_last_stage(tmp_path):
    model, asked = tiny_model(tmp_path, tie_word_embeddings=True), server()
    stages = memory_of(model, asked, Layout(1, 3, 1))
    (whole,) = memory_of(model, asked)
    again = sum(s.buffers.weights for s in stages) - whole.buffers.weights
    assert again == 2 * model.embedding


def test_layers_with_a_sliding_window_keep_a_window_and_select_nothing(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 3
    changed = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    hybrid = tiny_model(tmp_path, layer_types=kinds, sliding_window=100, **changed)
    asked = server()
    (memory,), layer_token = memory_of(hybrid, asked), 2 * 2 * 16 * 2
    assert memory.kv_token == 3 * layer_token
    window = -(-(100 - 1 + 1024) // BLOCK_SIZE) + 1
    assert memory.kv_context == 3 * layer_token * (4096 + window * BLOCK_SIZE)
    full = tiny_model(tmp_path, layer_types=["full_attention"] * 6, **changed)
    (all_layers,) = memory_of(full, asked)
    assert 2 * memory.buffers.selection_cache == all_layers.buffers.selection_cache


def test_smaller_weights_and_cache_take_their_share(tmp_path):
    model = tiny_model(tmp_path)
    (wide,) = memory_of(model, server())
    (narrow,) = memory_of(model, server(weight_bytes=0.5, kv_dtype=torch.float8_e4m3fn))
    matrices = sum(layer.matrices for layer in model.layers)
    assert wide.buffers.weights - narrow.buffers.weights == int(1.5 * matrices)
    assert narrow.kv_context * 2 == wide.kv_context


@pytest.mark.parametrize(
    ("changed", "in_place"),
    [
        ({}, True),
        ({"gpu": find_gpu("a100")}, False),
        ({"gpu": find_gpu("141GB")}, False),
        ({"kv_dtype": torch.float8_e4m3fn}, False),
        ({"dtype": torch.float32}, False),
        ({"settings": {"positions": "reassigned"}}, False),
        ({"settings": {"attention": "sdpa"}}, False),
    ],
)
def test_only_what_cannot_be_attended_in_place_needs_a_gather_buffer(tmp_path, changed, in_place):
    asked = server(**changed)
    (memory,) = memory_of(tiny_model(tmp_path), asked)
    assert asked.attends_in_place == in_place
    assert asked.decodes_in_place == (in_place or asked.config.attention == "auto")
    assert (memory.buffers.gather_buffer == 0) == in_place
    assert step_limits(asked, RankShape(8, 2, 16)).full_attention == in_place


def test_no_state_without_a_selection_cache(tmp_path):
    (memory,) = memory_of(tiny_model(tmp_path), server(settings={"similarity_threshold": 1}))
    assert memory.buffers.selection_cache == 0


def test_a_workspace_that_holds_no_query_is_refused_as_the_server_does(tmp_path):
    asked = server(context=1 << 20, settings={"workspace_mb": 1})
    with pytest.raises(SettingsError, match="workspace_mb=1 cannot hold"):
        memory_of(tiny_model(tmp_path), asked)


def test_settings_that_the_engine_refuses_are_refused_here():
    with pytest.raises(SettingsError, match="cannot hold a query chunk"):
        server(max_num_batched_tokens=512)
    with pytest.raises(ValueError, match="no share"):
        server(utilization=1.5)
