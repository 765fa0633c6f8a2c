"""SmolLM2 with a fourth KV head that does nothing, so that two ranks can divide its heads.

The head's queries, keys and values are zeros, and nothing of its output is read. Its votes are the same
for every candidate, and a query of zeros resembles any other: what is selected and what is said stay
what they are.
"""

from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

RANKS = 2


def with_divisible_heads(model: Path, target: Path) -> Path:
    """Write such a copy of a model of the Llama kind; returns its folder."""
    config = AutoConfig.from_pretrained(model)
    head_size = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    kv_heads = -(-config.num_key_value_heads // RANKS) * RANKS
    rows = {"q_proj": kv_heads * group, "k_proj": kv_heads, "v_proj": kv_heads}
    copytree(model, target)
    (weights_file,) = target.glob("*.safetensors")
    weights = load_file(weights_file)
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in rows:
            weights[name] = _padded(weight, rows[kind] * head_size, 0)
        elif kind == "o_proj":
            weights[name] = _padded(weight, kv_heads * group * head_size, 1)
    save_file(weights, weights_file, {"format": "pt"})
    config.head_dim = head_size
    config.num_attention_heads, config.num_key_value_heads = kv_heads * group, kv_heads
    config.save_pretrained(target)
    return target


def _padded(weight: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    shape = list(weight.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim)
