"""Which layers of a model would run on which backend, from its configuration file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vllm_tokenselect.hooks.registration import BACKEND_NAME


class LayerGroup(NamedTuple):
    """Layers of one kind: their indices as text, the kind, the backend, and why."""

    layers: str
    kind: str
    backend: str
    reason: str


_KINDS = {
    "full_attention": (BACKEND_NAME, "full attention over the whole context"),
    "sliding_attention": ("vLLM's default", "sliding-window layers read a bounded window anyway"),
    "chunked_attention": ("vLLM's default", "reads its own chunk only"),
    "linear_attention": ("vLLM's default", "keeps no key per token"),
    "mla": ("refused", "multi-head latent attention caches no per-head keys to score"),
}


def describe_layers(model: str | Path) -> list[LayerGroup]:
    """Describe the layers of a model folder or hub name.

    Raises:
        OSError: when the model's configuration cannot be read.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(model))
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None) is not None:
        kinds = ["mla"] * text.num_hidden_layers
    else:
        kinds = list(getattr(text, "layer_types", None) or _kinds_without_types(text))
    groups = []
    for kind in dict.fromkeys(kinds):
        backend, reason = _KINDS.get(kind, ("vLLM's default", "not full attention"))
        layers = [index for index, other in enumerate(kinds) if other == kind]
        groups.append(LayerGroup(_ranges(layers), kind, backend, reason))
    return groups


def _kinds_without_types(text: Any) -> list[str]:
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * text.num_hidden_layers


def _ranges(indices: list[int]) -> str:
    """`0-2, 5` for [0, 1, 2, 5]."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1][1:] = [index]
        else:
            parts.append([index])
    return ", ".join("-".join(map(str, part)) for part in parts)
