"""Tiny random models of many families: every kind of RoPE, and every way to be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRAINED = 512  # tokens

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "initializer_range": 0.3,  # so large that attention matters
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


LONGROPE = {
    "original_max_position_embeddings": TRAINED,
    **rope(
        "longrope",
        short_factor=[1.0 + i / 8 for i in range(16)],
        long_factor=[2.0 + i / 4 for i in range(16)],
        original_max_position_embeddings=TRAINED,
    ),
}

# Family of transformers, and what differs from COMMON (`silent_layer` and `mute_layer`, whose attention
# has no effect, are ours). Head size 32.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("Llama", {}),
    "linear": ("Llama", rope("linear", factor=2.0)),
    "dynamic NTK": ("Llama", rope("dynamic", factor=2.0)),
    "llama3": (
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    "yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "interleaved": ("Cohere", {"logit_scale": 1.0}),
    "partial": ("StableLm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                "partial_rotary_factor": 0.5}}),
    "partial interleaved": ("Glm4", {"head_dim": 32}),
    "q/k norm": ("Qwen3", {"head_dim": 32}),
    "q/k norm of all heads": ("Olmoe", {"num_experts": 2, "num_experts_per_tok": 1}),
    "biases": ("Qwen2", {}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Phi-3": ("Phi3", {}),
    "GPT-J": ("GPTJ", {"rotary_dim": 16}),
    "a layer whose queries and keys are zero": ("Llama", {"silent_layer": 1}),
    "transformers' code": ("Olmo2", {}),
    "transformers' code, partial, yarn": (
        "Phi",
        rope("yarn", factor=4.0, original_max_position_embeddings=128, partial_rotary_factor=0.5),
    ),
    "Gemma 3, with sliding windows": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 64,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "Gemma 4, with layers that read the keys of others": (
        "Gemma4Text",
        {
            "head_dim": 32,
            "global_head_dim": 32,
            "sliding_window": 64,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 256,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "layers without positions": (
        "Cohere2",
        {"logit_scale": 1.0, "sliding_window": 64,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "layers without positions, biases, gates": (
        "Afmoe",
        {"head_dim": 32, "sliding_window": 64, "num_dense_layers": 2, "n_group": 1, "topk_group": 1,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "layers without positions, q/k norm": (
        "Exaone4",
        {"head_dim": 32, "sliding_window": 64, "sliding_window_pattern": None,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "transformers' code, layers without positions": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "LongRoPE": ("Phi3", {**LONGROPE, "max_position_embeddings": 4 * TRAINED}),
    "dropout until the weights are loaded": (
        "SeedOss",
        {"head_dim": 32, "attention_dropout": 0.1, "residual_dropout": 0.1},
    ),
    "queries that are scaled past the longest context": (
        "Ministral3",
        {"head_dim": 32,
         "llama_4_scaling": {"original_max_position_embeddings": TRAINED, "beta": 0.5}},
    ),
}  # fmt: skip

CHANGED = "queries or keys are changed after their rotation (as by a norm)"

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "learned positions": (
        "OPT",
        {"ffn_dim": 96, "word_embed_proj_dim": 128},
        "OPTForCausalLM: positions are added to the hidden states (learned or sinusoidal ones) (model.",
    ),
    "queries scaled by their position": (
        "Ministral3",
        {"head_dim": 32,
         "llama_4_scaling": {"original_max_position_embeddings": TRAINED // 2, "beta": 0.5}},
        "MistralForCausalLM: queries are scaled by their position in the text, unless --max-model-len",
    ),
    "transformers' code, a norm after the rotation": (
        "HunYuanDenseV1",
        {"head_dim": 32},
        f"TransformersForCausalLM: {CHANGED} (model.layers.0.self_attn.attn, model.layers.1",
    ),
    "transformers' code, interleaved": (
        "Glm",
        {"head_dim": 32},
        "TransformersForCausalLM: transformers' code rotates neighboring elements of a head, not halves",
    ),
}  # fmt: skip


# The others are for `make endurance`: each engine takes seconds to start.
EVERY_RUN = {
    "transformers' code, partial, yarn",
    "Gemma 3, with sliding windows",
    "layers without positions",
    "queries scaled by their position",
}


def save(folder: Path, family: str, options: dict[str, Any]) -> Path:
    """Write a random model of the family, once."""
    import torch
    import transformers

    if (folder / "config.json").exists():
        return folder
    options = dict(options)
    silent_layer, mute_layer = options.pop("silent_layer", None), options.pop("mute_layer", None)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **options})
    torch.manual_seed(0)
    names = (f"{family}ForCausalLM", f"{family.removesuffix('Text')}ForCausalLM")
    model = next(getattr(transformers, n) for n in names if hasattr(transformers, n))
    made = model(config).float()
    for name, parameter in made.named_parameters():
        if name.endswith(".sinks"):  # about as large as the scores of a whole prompt
            torch.nn.init.uniform_(parameter, 0, 5)
        elif parameter.dim() == 1:  # the weights of norms would all be 1
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if silent_layer is not None:
        torch.nn.init.zeros_(made.model.layers[silent_layer].input_layernorm.weight)
    if mute_layer is not None:
        torch.nn.init.zeros_(made.model.layers[mute_layer].self_attn.o_proj.weight)
    made.save_pretrained(folder)
    return folder
