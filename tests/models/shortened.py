"""The first layers of a real model: quick to load and to compile, with a real tokenizer."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from safetensors.torch import load_file, save_file
from transformers import AutoConfig


def first_layers(model: Path, target: Path, count: int) -> Path:
    """Write a copy of a model of the Llama kind that ends after `count` layers; returns its folder."""
    copytree(model, target, ignore=ignore_patterns("*.safetensors"))
    (weights_file,) = model.glob("*.safetensors")
    weights = {
        name: weight
        for name, weight in load_file(weights_file).items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < count
    }
    save_file(weights, target / weights_file.name, {"format": "pt"})
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = count
    config.save_pretrained(target)
    return target
