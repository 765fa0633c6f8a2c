"""Tiny configurations of the families that people serve, without weights, and which of them are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.zoo import COMMON, rope

# The smallest configuration file with both windows and full attention.
GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "sliding_window": 64,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}

# Mixtures of experts, and the names that some give to the same things.
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
WINDOWS = {
    "sliding_window": 64,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LATENT = {
    **EXPERTS,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
LINEAR = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,  # what vLLM's kernel for CPUs takes
    "linear_value_head_dim": 128,
}
HEAD = {"head_dim": 32}
CONVOLUTION = {"conv_dim": 128, "layer_types": ["conv", "full_attention"]}

# Family of transformers, and what differs from COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen2, YaRN": ("Qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=1024)),
    "Qwen2-MoE": ("Qwen2Moe", EXPERTS),
    "Qwen3": ("Qwen3", HEAD),
    "Qwen3-MoE": ("Qwen3Moe", {**EXPERTS, **HEAD}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mixtral": ("Mixtral", {**EXPERTS, "sliding_window": None}),
    "GLM-4": ("Glm4", HEAD),
    "GLM-4.5 MoE": ("Glm4Moe", {**EXPERTS, **HEAD}),
    "Phi-3": ("Phi3", {}),
    "Granite": ("Granite", {}),
    "Granite MoE": ("GraniteMoe", EXPERTS),
    "Ernie 4.5": ("Ernie4_5", HEAD),
    "Nemotron": ("Nemotron", HEAD),
    "Apertus": ("Apertus", {}),
    "Arcee": ("Arcee", HEAD),
    "StarCoder2": ("Starcoder2", {"sliding_window": None}),
    "Command R": ("Cohere", {"logit_scale": 1.0}),
    "Solar-Open": ("SolarOpen", {**EXPERTS, **HEAD}),
    "MiniMax-M2": ("MiniMaxM2", {**EXPERTS, **HEAD, "rotary_dim": 16, "scoring_func": "softmax",
                   "use_routing_bias": True}),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "HunYuan": ("HunYuanDenseV1", HEAD),
    "Seed-OSS": ("SeedOss", HEAD),
    "Gemma 3": ("Gemma3Text", {**WINDOWS, **HEAD}),
    "Gemma 4": ("Gemma4Text", {**WINDOWS, **HEAD, "global_head_dim": 32,
                "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "Cohere 2": ("Cohere2", {**WINDOWS, "logit_scale": 1.0}),
    "OLMo 3": ("Olmo3", WINDOWS),
    "EXAONE 4": ("Exaone4", {**WINDOWS, **HEAD, "sliding_window_pattern": None}),
    "AfMoE": ("Afmoe", {**EXPERTS, **WINDOWS, **HEAD, "num_dense_layers": 1,
              "score_func": "sigmoid", "route_norm": True}),
    "Llama 4": ("Llama4Text", {**EXPERTS, **HEAD, "num_hidden_layers": 4,
                "intermediate_size_mlp": 96, "attention_chunk_size": 64,
                "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
                "no_rope_layers": [1, 1, 1, 0], "interleave_moe_layer_step": 5}),
    "Qwen3-Next": ("Qwen3Next", {**EXPERTS, **LINEAR}),
    "Qwen3.5": ("Qwen3_5Text", LINEAR),
    "Qwen3.5 MoE": ("Qwen3_5MoeText", {**EXPERTS, **LINEAR}),
    "Granite 4-H": ("GraniteMoeHybrid", {**EXPERTS, **MAMBA, "shared_intermediate_size": 64,
                    "layer_types": ["mamba", "attention"]}),
    "Nemotron-H": ("NemotronH", {**MAMBA, **HEAD, "mamba_num_heads": 8, "mamba_head_dim": 32,
                   "ssm_state_size": 16, "n_groups": 1, "num_hidden_layers": 4,
                   "layers_block_type": ["mamba", "mlp", "attention", "mlp"]}),
    "Zamba2": ("Zamba2", {"num_hidden_layers": 4, "mamba_d_state": 16, "mamba_headdim": 32,
               "n_mamba_heads": 8, "num_mem_blocks": 1, "num_key_value_heads": 4,
               "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 64}),
    "Falcon-H1": ("FalconH1", {**MAMBA, **HEAD, "mamba_d_ssm": 256}),
    "LFM2": ("Lfm2", {**CONVOLUTION, "conv_bias": False, "block_dim": 128, "block_multiple_of": 32}),
    "gpt-oss": ("GptOss", {**EXPERTS, **WINDOWS, **HEAD}),
    "Gemma 3n": ("Gemma3nText", {**HEAD, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                 "layer_types": ["sliding_attention", "full_attention"] * 2,
                 "hidden_size_per_layer_input": 32, "laurel_rank": 16, "sliding_window": 64,
                 "vocab_size_per_layer_input": 256, "intermediate_size": [96] * 4,
                 "activation_sparsity_pattern": [0.0] * 4}),
    "Gemma 4 E": ("Gemma4Text", {**WINDOWS, **HEAD, "global_head_dim": 32,
                  "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32,
                  "vocab_size_per_layer_input": 256}),
    "Gemma 2": ("Gemma2", {**WINDOWS, **HEAD, "initializer_range": 0.05, "query_pre_attn_scalar": 1,
                "attn_logit_softcapping": 5.0}),
    "BLOOM": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "DeepSeek V3": ("DeepseekV3", LATENT),
    "GLM-4.7-Flash": ("Glm4MoeLite", LATENT),
    "LongCat": ("LongcatFlash", {**LATENT, "num_layers": 2, "expert_ffn_hidden_size": 64,
                "ffn_hidden_size": 96, "moe_topk": 2, "zero_expert_num": 0}),
    "MiMo-V2": ("MiMoV2Flash", {**EXPERTS, **WINDOWS, **HEAD, "v_head_dim": 16,
                "hybrid_layer_pattern": [1, 0] * 2, "moe_layer_freq": [0] * 4,
                "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32,
                "swa_v_head_dim": 16, "sliding_window_size": 64, "attention_bias": False,
                "layernorm_epsilon": 1e-5, "swa_rope_theta": 1e4, "rope_theta": 1e4}),
    "Mistral-7B-v0.1": ("Mistral", {"sliding_window": 64}),
    "Phi-3-4k": ("Phi3", {"sliding_window": 64}),
    "Mamba 2": ("Mamba2", {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1}),
    "Granite-SWA": ("GraniteSWA", WINDOWS),
    "Laguna": ("Laguna", {**EXPERTS, **WINDOWS, **HEAD}),
    "PhiMoE": ("Phimoe", {**EXPERTS, "intermediate_size": 64, "sliding_window": None}),
    "Hy3": ("HYV3", {**EXPERTS, **HEAD, "qk_norm": True, "expert_hidden_dim": 64, "num_shared_experts": 1,
            "route_norm": True}),
    "Ministral": ("Ministral", {**WINDOWS, **HEAD}),
    "Ministral 3": ("Ministral3", HEAD),
    "Ernie 4.5 MoE": ("Ernie4_5_Moe", {**EXPERTS, "moe_k": 2, "moe_num_experts": 4,
                      "moe_num_shared_experts": 1}),
    "HunYuan MoE": ("HunYuanMoEV1", {**EXPERTS, **HEAD, "intermediate_size": 64, "moe_topk": [2, 2]}),
    "Mellum": ("Mellum", {**EXPERTS, **HEAD}),
    "Cohere 2 MoE": ("Cohere2Moe", {**EXPERTS, **WINDOWS, "logit_scale": 1.0}),
    "LFM2-MoE": ("Lfm2Moe", {**EXPERTS, **CONVOLUTION, "num_dense_layers": 1}),
    "DeepSeek V3.2": ("DeepseekV32", {**LATENT, "index_topk": 64, "index_head_dim": 32,
                      "index_n_heads": 4}),
    "GLM-5": ("GlmMoeDsa", {**LATENT, "index_topk": 64, "index_head_dim": 32,
              "index_n_heads": 4}),
    # Older ones, and rarer.
    "Phi-4-mini": ("Phi3", rope("longrope", short_factor=[1.0] * 16, long_factor=[2.0] * 16,
                   original_max_position_embeddings=512)),
    "Gemma": ("Gemma", HEAD),
    "GLM": ("Glm", HEAD),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "OLMoE": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "FlexOLMo": ("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Phi-2": ("Phi", {}),
    "StableLM": ("StableLm", {}),
    "GPT-J": ("GPTJ", {"rotary_dim": 16}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "Falcon": ("Falcon", {"new_decoder_architecture": False, "alibi": False}),
    "Persimmon": ("Persimmon", {}),
    "OPT": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 128}),
    "GPT-BigCode": ("GPTBigCode", {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 4096,
                    "n_inner": 96}),
    "MPT": ("Mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 4096,
            "expansion_ratio": 1}),
    "Dots 1": ("Dots1", {**EXPERTS, **HEAD}),
    "Granite MoE, shared": ("GraniteMoeShared", {**EXPERTS, "shared_intermediate_size": 64}),
    "Granite MoE-SWA": ("GraniteMoeSWA", {**EXPERTS, **WINDOWS}),
    "CWM": ("Cwm", {**WINDOWS, **HEAD}),
    "EXAONE MoE": ("ExaoneMoe", {**EXPERTS, **WINDOWS, **HEAD}),
    "Jais 2": ("Jais2", HEAD),
    "HyperCLOVA X": ("HyperCLOVAX", HEAD),
    "VaultGemma": ("VaultGemma", {**WINDOWS, **HEAD}),
    "NanoChat": ("NanoChat", HEAD),
    "Helium": ("Helium", HEAD),
    "Jamba": ("Jamba", {**EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 8,
              "use_mamba_kernels": False}),
    "Bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "OLMo hybrid": ("OlmoHybrid", LINEAR),
    "MiniMax": ("MiniMax", {**EXPERTS, **HEAD,
                "layer_types": ["linear_attention", "full_attention"]}),
    "Kimi Linear": ("KimiLinear", LATENT),
    "Mamba": ("Mamba", {"state_size": 16}),
    "Falcon-Mamba": ("FalconMamba", {"state_size": 16}),
    "DeepSeek V2": ("DeepseekV2", LATENT),
    "Mistral 4": ("Mistral4", LATENT),
    "MiniCPM 3": ("MiniCPM3", LATENT),
    "AX-K1": ("AXK1", LATENT),
    "HRM": ("HrmText", HEAD),
    "Youtu": ("Youtu", LATENT),
    "HY4": ("HYV4", {**EXPERTS, **HEAD}),
    "BitNet": ("BitNet", {}),
}  # fmt: skip


# What a server says of those that it does not serve.
REFUSED = {
    "BLOOM": "its attention has ALiBi",
    "DeepSeek V3": "multi-head latent attention (MLA)",
    "DeepSeek V3.2": "multi-head latent attention (MLA)",
    "GLM-4.7-Flash": "multi-head latent attention (MLA)",
    "GLM-5": "multi-head latent attention (MLA)",
    "LongCat": "multi-head latent attention (MLA)",
    "MiMo-V2": "layers that should select would not (layers 0, 2: TRITON_ATTN_DIFFKV (sliding window)",
    "Mistral-7B-v0.1": "no layer would select (layers 0-1: CPU_ATTN (sliding window))",
    "Phi-3-4k": "no layer would select (layers 0-1: CPU_ATTN (sliding window))",
    "Mamba 2": "no layer would select (layers 0-1: MAMBA2_ATTN (no key per token))",
    "DeepSeek V2": "multi-head latent attention (MLA)",
    "AX-K1": "multi-head latent attention (MLA)",
    "Youtu": "multi-head latent attention (MLA)",
    "Mistral 4": "multi-head latent attention (MLA)",
    "MiniCPM 3": "its head size is 48",
    "Mamba": "no layer would select (layers 0-1: MAMBA1_ATTN (no key per token))",
    "Falcon-Mamba": "no layer would select (layers 0-1: MAMBA1_ATTN (no key per token))",
}
# Not made by vLLM's CPU build, or not to be looked at without torchvision, whatever the backend.
NOT_BY_VLLM = {
    "Qwen3.5", "Qwen3.5 MoE", "MPT", "Bamba", "OLMo hybrid", "Kimi Linear", "MiniMax", "HRM", "HY4",
}  # fmt: skip

# One of each kind. The others are for `make endurance`: each takes seconds.
EVERY_RUN = {
    "Gemma 3", "Llama 4", "Qwen3-Next", "gpt-oss", "Gemma 2", "Gemma 3n", "DeepSeek V3", "BLOOM",
    "MiMo-V2", "Phi-3-4k",
}  # fmt: skip


# Families that hand queries of three dimensions to vLLM's rotary operation for CPUs, which then takes a
# token's first head for all of them. With reassigned positions TOKENSELECT rotates, as it should be.
WRONGLY_ROTATED = {"LFM2", "LFM2-MoE"}


def save_config(folder: Path, family: str, options: dict[str, Any]) -> Path:
    """Write the configuration of such a model, once."""
    import transformers

    if not (folder / "config.json").exists():
        config = getattr(transformers, f"{family}Config")(**{**COMMON, **options})
        config.architectures = [f"{family.removesuffix('Text')}ForCausalLM"]
        config.save_pretrained(folder)
    return folder
