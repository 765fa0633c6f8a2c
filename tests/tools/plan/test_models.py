"""Weights are counted on transformers' own model, and what cannot be served or counted is refused."""

import pytest
import torch

from tests.models.families import FAMILIES, save_config
from tests.tools.plan.sized import tiny_folder, tiny_model
from vllm_tokenselect.tools.plan.models import read_model

# Of the published checkpoints.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b-1m": 7_615_616_512,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_weights_as_the_published_model(name):
    assert read_model(name).num_weights == PUBLISHED[name]


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_of_an_allocated_model_is_counted_once(tmp_path, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = tiny_model(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.num_weights == sum(parameter.numel() for parameter in model.parameters())
    assert shape.head == (0 if tied else shape.embedding)
    assert shape.final == shape.hidden_size
    assert {layer.vectors for layer in shape.layers} == {2 * shape.hidden_size}  # two norms


def test_the_weights_that_make_keys_and_values_are_those_of_the_model(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = tiny_model(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    attention = model.model.layers[0].self_attn
    assert shape.kv_matrices == attention.k_proj.weight.numel() + attention.v_proj.weight.numel()


REFUSED = {
    "multi-head latent attention": {"kv_lora_rank": 64},
    "layers of linear_attention": {"layer_types": ["linear_attention", *["full_attention"] * 5]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_is_not_served_is_refused_by_name(tmp_path, reason):
    with pytest.raises(ValueError, match=f"has {reason}: TOKENSELECT does not serve it"):
        tiny_model(tmp_path, **REFUSED[reason])


UNEVEN = {
    "layers that read the keys of others": {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "layers whose heads differ": {"num_kv_shared_layers": 0, "global_head_dim": 64},
}


@pytest.mark.parametrize("reason", UNEVEN)
def test_a_model_whose_caches_differ_by_layer_is_not_counted_wrongly(tmp_path, reason):
    """Gemma 4."""
    family, options = FAMILIES["Gemma 4"]
    folder = save_config(tmp_path, family, options | UNEVEN[reason])
    with pytest.raises(ValueError, match=f"has {reason}: TOKENSELECT serves it, but the plan"):
        read_model(str(folder))


def test_quantized_weights_need_their_size_said(tmp_path):
    folder = tiny_folder(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="quantized: say by --weights-dtype"):
        read_model(str(folder))
    assert read_model(str(folder), quantized_ok=True).num_weights > 0
