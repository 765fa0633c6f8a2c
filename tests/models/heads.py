"""Random layers that draft for a small model, one each, as EAGLE, EAGLE-3 and MiMo have them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.zoo import save


def save_eagle(target: Path, folder: Path) -> Path:
    """Write an EAGLE head that reads the target's last hidden states and embeddings; returns its folder."""
    config = json.loads((target / "config.json").read_text())
    width = config["hidden_size"]
    weights = {"fc.weight": (width, 2 * width)}
    weights |= {f"layers.0.{name}": shape for name, shape in _layer(config, width).items()}
    return _save(folder, {**config, "num_hidden_layers": 1}, weights)


def save_eagle3(target: Path, folder: Path) -> Path:
    """Write an EAGLE-3 head that reads the hidden states before layers 1, 2 and 3; returns its folder."""
    config = json.loads((target / "config.json").read_text())
    width = config["hidden_size"]
    weights = {"fc.weight": (width, 3 * width), "norm.weight": (width,)}
    weights |= {f"midlayer.{name}": shape for name, shape in _layer(config, 2 * width).items()}
    weights |= {f"midlayer.{name}.weight": (width,) for name in ("input_layernorm", "hidden_norm")}
    weights["lm_head.weight"] = (config["vocab_size"], width)
    changed = {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLMEagle3"]}
    changed["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    return _save(folder, {**config, **changed}, weights)


def save_mimo(folder: Path, options: dict) -> Path:
    """Write a random MiMo with a layer that predicts one token more (MTP); returns its folder."""
    save(folder, "Qwen2", {**options, "num_nextn_predict_layers": 1})
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"]
    names = ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_layernorm")
    layer = {f"{name}.weight": (width,) for name in names}
    layer |= {"input_proj.weight": (width, 2 * width), **_layer(config, width)}
    for name in ("q_proj", "k_proj", "v_proj"):
        layer[f"self_attn.{name}.bias"] = layer[f"self_attn.{name}.weight"][:1]
    shapes = {f"model.mtp_layers.0.{name}": shape for name, shape in layer.items()}
    weights = load_file(folder / "model.safetensors") | _random(shapes)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = {"architectures": ["MiMoForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


def _layer(config: dict, read: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights, whose attention reads so many numbers a token."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or width // heads
    return {
        "self_attn.q_proj.weight": (heads * size, read),
        "self_attn.k_proj.weight": (kv_heads * size, read),
        "self_attn.v_proj.weight": (kv_heads * size, read),
        "self_attn.o_proj.weight": (width, heads * size),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "post_attention_layernorm.weight": (width,),
    }


def _save(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True)
    save_file(_random(shapes), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }
