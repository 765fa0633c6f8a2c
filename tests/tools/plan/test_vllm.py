"""What is said of vLLM here is what vLLM says itself."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.tools.plan.sized import server, tiny_model
from vllm_tokenselect.tools.plan.layouts import Layout, cut_stages
from vllm_tokenselect.tools.plan.memory import RankShape, gpu_memory, kv_page_bytes
from vllm_tokenselect.tools.plan.planned_server import BLOCK_SIZE, GPUS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("kv_heads", "head_size"), [(8, 128), (1, 64), (4, 96)])
def test_a_block_takes_the_bytes_of_vllms_own_accounting(dtype, kv_heads, head_size):
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=kv_heads, head_size=head_size, dtype=dtype
    )
    rank = RankShape(kv_heads * 4, kv_heads, head_size)
    assert kv_page_bytes(rank, dtype) == spec.page_size_bytes


def test_a_context_takes_the_blocks_of_vllms_own_accounting(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 3
    model = tiny_model(tmp_path, model_type="gemma3_text", layer_types=kinds, sliding_window=100)
    asked = server(context=5000)
    shape = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 16, "dtype": asked.kv_dtype}
    window = SlidingWindowSpec(**shape, sliding_window=100)
    blocks = window.max_admission_blocks_per_request(asked.max_num_batched_tokens, asked.context)
    full = FullAttentionSpec(**shape)
    (stage,) = cut_stages(model.layers, 1)
    memory = gpu_memory(model, asked, Layout(1, 1, 1), stage)
    wanted = blocks * window.page_size_bytes + -(-5000 // BLOCK_SIZE) * full.page_size_bytes
    assert memory.kv_context == 3 * wanted


@pytest.mark.parametrize("pp", [1, 2, 4, 5, 8])
def test_layers_are_cut_into_stages_as_vllm_cuts_them(tmp_path, pp):
    layers = tiny_model(tmp_path, num_hidden_layers=14).layers
    edges = [get_pp_indices(14, rank, pp) for rank in range(pp)]
    assert [len(stage.layers) for stage in cut_stages(layers, pp)] == [b - a for a, b in edges]


@pytest.mark.parametrize("name", GPUS)
def test_batches_are_vllms_defaults_for_such_a_gpu(monkeypatch, name):
    gpu = GPUS[name]
    platform = type(current_platform)
    monkeypatch.setattr(platform, "get_device_total_memory", lambda *_: gpu.memory)
    monkeypatch.setattr(platform, "get_device_name", lambda *_: f"NVIDIA {name.upper()}")
    monkeypatch.setattr(platform, "is_cpu", lambda *_: False)
    tokens, seqs = EngineArgs.get_batch_defaults(world_size=1)
    server_side = UsageContext.OPENAI_API_SERVER
    assert gpu.batch == (tokens[server_side], seqs[server_side])
