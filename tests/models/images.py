"""Tiny random models that see images: weights, and a processor whose words are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.families import EXPERTS, HEAD, LINEAR, WINDOWS
from tests.models.processors import ID, SIDE, save_processor
from tests.models.zoo import COMMON

# Sizes of an image encoder, by the names that its families give them.
ENCODER = {
    "depth": 2, "num_hidden_layers": 2, "hidden_size": 64, "num_heads": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "out_hidden_size": COMMON["hidden_size"], "initializer_range": 0.3,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
MROPE_INTERLEAVED = {
    "rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True},
}
QWEN = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
GEMMA4_ENCODER = {
    "head_dim": 32, "num_key_value_heads": 2, "patch_size": 14, "default_output_length": 16,
}  # fmt: skip
GEMMA4 = {
    "audio_config": None,
    "image_token_id": ID["<|image|>"],
    "boi_token_id": ID["<start_of_image>"],
    "eoi_token_id": ID["<end_of_image>"],
}

# Family of transformers; what differs from COMMON in its text part; its encoder; the rest.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Qwen2.5-VL": ("Qwen2_5_VL", MROPE, {"fullatt_block_indexes": [1]}, QWEN),
    "Qwen3-VL": (
        "Qwen3VL",
        {**HEAD, **MROPE_INTERLEAVED},
        {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        QWEN,
    ),
    "Qwen3.5": (
        "Qwen3_5",
        {**LINEAR, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
         "rope_parameters": {**MROPE_INTERLEAVED["rope_parameters"], "partial_rotary_factor": 1.0}},
        {"num_position_embeddings": 64},
        QWEN,
    ),
    "GLM-4V": (
        "Glm4v",
        {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 0.5,
         "mrope_section": [2, 3, 3]}},
        {"image_size": SIDE},
        {
            "image_token_id": ID["<|image|>"],
            "video_token_id": ID["<|video|>"],
            "image_start_token_id": ID["<|begin_of_image|>"],
            "image_end_token_id": ID["<|end_of_image|>"],
            "video_start_token_id": ID["<|begin_of_video|>"],
            "video_end_token_id": ID["<|end_of_video|>"],
        },
    ),
    "Mistral 3": (
        "Mistral3",
        {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
        {"model_type": "pixtral", "head_dim": 32, "image_size": SIDE, "patch_size": 14},
        {"image_token_index": ID["[IMG]"], "vision_feature_layer": -1},
    ),
    "LLaVA": (
        "Llava",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 14},
        {"image_token_index": ID["<image>"], "image_seq_length": 64},
    ),
    "InternVL": (
        "InternVL",
        {"model_type": "qwen2"},
        {"image_size": [SIDE, SIDE], "patch_size": [14, 14]},
        {"image_token_id": ID["<IMG_CONTEXT>"], "image_seq_length": 16},
    ),
    "Llama 4": (
        "Llama4",
        {**EXPERTS, **HEAD, "num_hidden_layers": 4, "intermediate_size_mlp": 96,
         "attention_chunk_size": 64, "no_rope_layers": [1, 1, 1, 0], "interleave_moe_layer_step": 5,
         "layer_types": ["chunked_attention"] * 3 + ["full_attention"]},
        {"image_size": SIDE, "patch_size": 14, "vision_output_dim": 64,
         "projector_input_dim": 64, "projector_output_dim": 64},
        {
            "image_token_index": ID["<|patch|>"],
            "boi_token_index": ID["<|image_start|>"],
            "eoi_token_index": ID["<|image_end|>"],
        },
    ),
    "Gemma 3": (
        "Gemma3",
        {**WINDOWS, **HEAD, "initializer_range": 0.03},
        {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 14},
        {
            "mm_tokens_per_image": 16,
            "image_token_index": ID["<image_soft_token>"],
            "boi_token_index": ID["<start_of_image>"],
            "eoi_token_index": ID["<end_of_image>"],
        },
    ),
    "Gemma 4": (
        "Gemma4",
        {**WINDOWS, **HEAD, "initializer_range": 0.03, "global_head_dim": 32, "num_kv_shared_layers": 0,
         "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"},
        GEMMA4_ENCODER,
        GEMMA4,
    ),
}  # fmt: skip

# What stands in a prompt for an image, before the processor.
PLACEHOLDER = {
    "Qwen2.5-VL": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
    "Qwen3-VL": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
    "Qwen3.5": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
    "GLM-4V": ["<|begin_of_image|>", "<|image|>", "<|end_of_image|>"],
    "Mistral 3": ["[IMG]"],
    "LLaVA": ["<image>"],
    "InternVL": ["<IMG_CONTEXT>"],
    "Llama 4": ["<|image|>"],
    "Gemma 3": ["<start_of_image>"],
    "Gemma 4": ["<|image|>"],
}
# vLLM's CPU build has its gated DeltaNet in no other type.
BFLOAT16 = {"Qwen3.5"}
# vLLM's CPU build does not encode their images, on any backend.
NO_IMAGE_ON_CPUS = {"Llama 4"}
# Their images are attended in both directions.
REFUSED = {"Gemma 3", "Gemma 4"}

# The others are for `make endurance`: each takes half a minute.
EVERY_RUN = {"Qwen3-VL", "Gemma 4"}


def save(folder: Path, name: str) -> Path:
    """Write a random model of the family with its processor, once."""
    import torch
    import transformers

    if (folder / "config.json").exists():
        return folder
    family, text, encoder, rest = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(
        text_config={**COMMON, "max_position_embeddings": 4096, **text},
        vision_config={**ENCODER, **encoder},
        **rest,
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForConditionalGeneration")(config).float()
    made.save_pretrained(folder)
    _rename_weights(folder / "model.safetensors")
    save_processor(folder, family)
    return folder


def _rename_weights(file: Path) -> None:
    """As vLLM knows them; transformers has since left out a level of some image encoders."""
    from safetensors.torch import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    if any("vision_tower.embeddings." in name for name in weights):
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
        save_file(weights, file, metadata={"format": "pt"})
