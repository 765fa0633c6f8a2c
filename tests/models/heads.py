"""Random layers that draft for a small model, one each, as EAGLE, EAGLE-3, MiMo and Qwen3-Next have them.

What a random model says follows mostly from the last token alone if its embeddings are large
(`echo_tokens`). A layer that reads little but that token's embedding proposes the same, now and then.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.zoo import save

WEIGHTS = "model.safetensors"
LITTLE = 0.1
TIMES_LARGER = 600  # so large that what was read before a token still decides what follows some
ADDING = re.compile("o_proj|down_proj")  # what a layer adds to its input comes out of these


def echo_tokens(model: Path) -> Path:
    """Multiply the embeddings of a model whose last matrix is another one; returns its folder."""
    weights = load_file(model / WEIGHTS)
    weights["model.embed_tokens.weight"] *= TIMES_LARGER
    save_file(weights, model / WEIGHTS, {"format": "pt"})
    return model


def save_eagle(target: Path, folder: Path) -> Path:
    """Write an EAGLE head that reads the target's last hidden states and embeddings; returns its folder."""
    config = json.loads((target / "config.json").read_text())
    width = config["hidden_size"]
    weights = _random({f"layers.0.{name}": shape for name, shape in _layer(config, width).items()})
    weights["fc.weight"] = _read_embedding(width, first=True)
    return _save(folder, {**config, "num_hidden_layers": 1}, weights)


def save_eagle3(target: Path, folder: Path) -> Path:
    """Write an EAGLE-3 head that reads the hidden states before layers 1, 2 and 3; returns its folder."""
    config = json.loads((target / "config.json").read_text())
    width = config["hidden_size"]
    shapes = {f"midlayer.{name}": shape for name, shape in _layer(config, 2 * width).items()}
    shapes |= {f"midlayer.{name}.weight": (width,) for name in ("input_layernorm", "hidden_norm")}
    weights = _random({"fc.weight": (width, 3 * width), "norm.weight": (width,), **shapes})
    weights["fc.weight"] *= LITTLE**4  # it is scaled up again where attention reads it
    for name, weight in _attend_to_itself(config).items():
        weights[f"midlayer.self_attn.{name}.weight"] = weight
    weights["lm_head.weight"] = load_file(target / WEIGHTS)["lm_head.weight"]
    changed = {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLMEagle3"]}
    changed["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    return _save(folder, {**config, **changed}, weights)


def save_mimo(folder: Path, options: dict) -> Path:
    """Write a random MiMo with a layer that predicts one token more (MTP); returns its folder."""
    save(folder, "Qwen2", {**options, "num_nextn_predict_layers": 1})
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"]
    names = ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_layernorm")
    layer = {f"{name}.weight": (width,) for name in names} | _layer(config, width)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer[f"self_attn.{name}.bias"] = layer[f"self_attn.{name}.weight"][:1]
    drafting = _random(layer)
    drafting["input_proj.weight"] = _read_embedding(width, first=False)
    weights = load_file(folder / WEIGHTS)
    weights |= {f"model.mtp_layers.0.{name}": weight for name, weight in drafting.items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    changed = {"architectures": ["MiMoForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


def save_qwen3_next(folder: Path, options: dict) -> Path:
    """Write a random Qwen3-Next with a layer that predicts one token more; returns its folder."""
    save(folder, "Qwen3Next", {**options, "num_nextn_predict_layers": 1})
    config = json.loads((folder / "config.json").read_text())
    width, last = config["hidden_size"], f"model.layers.{config['num_hidden_layers'] - 1}."
    weights = load_file(folder / WEIGHTS)
    names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    drafting = {f"mtp.{name}.weight": torch.zeros(width) for name in names}  # and one, each
    drafting["mtp.fc.weight"] = _read_embedding(width, first=True)
    for name in [name for name in weights if name.startswith(last)]:
        scale = LITTLE**2 if ADDING.search(name) else 1  # the model's own weights are large
        drafting[name.replace(last, "mtp.layers.0.")] = weights[name] * scale
    save_file(weights | drafting, folder / WEIGHTS, {"format": "pt"})
    return folder


def _read_embedding(width: int, *, first: bool) -> torch.Tensor:
    """A projection of embedding and hidden state, in either order, that hardly sees the hidden state."""
    hidden = _random({"hidden": (width, width)})["hidden"] * LITTLE
    halves = (torch.eye(width), hidden)
    return torch.cat(halves if first else halves[::-1], dim=1)


def _attend_to_itself(config: dict) -> dict[str, torch.Tensor]:
    """Projections of embedding and hidden state, with which a token reads much of its own embedding."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, size = config["num_key_value_heads"], config.get("head_dim") or width // heads
    shapes = {"keys": (kv_heads * size, width), "values": (width, kv_heads * size)}
    random = _random({**shapes, "hidden": (kv_heads * size, width)})
    values, _ = torch.linalg.qr(random["values"])  # [width, kv_heads * size]
    group = heads // kv_heads

    def for_queries(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (kv_heads, size)).repeat_interleave(group, 0).flatten(0, 1)

    keys = torch.cat([random["keys"] * 2, random["hidden"] * LITTLE], dim=1)
    return {
        "q_proj": for_queries(keys),
        "k_proj": keys,
        "v_proj": torch.cat([values.T, random["hidden"] * LITTLE], dim=1),
        "o_proj": for_queries(values.T).T.contiguous() / group,
    }


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


def _save(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of a layer that adds little to what it reads, and of norms that change nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        scale = LITTLE if ADDING.search(name) else 1
        weights[name] = torch.randn(shape, generator=generator) * scale / shape[-1] ** 0.5
    return weights
