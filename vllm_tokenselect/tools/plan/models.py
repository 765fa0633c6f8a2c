"""The shape of a model. Its weights are counted on transformers' model on the device `meta`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_tokenselect.profiles import ProfileModel

# Public configurations, to plan for without a network: the type that transformers knows, and what differs
# from its defaults.
_PRESETS = Path(__file__).with_name("presets.json")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class LayerShape:
    """One layer.

    Attributes:
        matrices: weights that tensor parallelism divides.
        vectors: weights that every GPU of the layer has: norms and biases.
        window: tokens of a sliding window; such a layer stays on vLLM's own attention. None for a layer on
            TOKENSELECT.
    """

    matrices: int
    vectors: int
    window: int | None


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory and traffic depend on.

    Attributes:
        name: as the user gave it.
        hidden_size: of the states between layers.
        num_heads, num_kv_heads, head_size: of a layer's attention.
        vocab_size: of the logits.
        mlp_width: of the activations between the two halves of a layer's MLP.
        trained_length: tokens of the longest context that the model was trained for.
        dtype: of its 16-bit weights.
        layers: in order.
        embedding: weights of the token embedding.
        head: weights of the output's embedding; 0 if it is tied to the token embedding.
        final: weights between the last layer and the output.
    """

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    mlp_width: int
    trained_length: int
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]
    embedding: int
    head: int
    final: int

    @property
    def num_weights(self) -> int:
        layers = sum(layer.matrices + layer.vectors for layer in self.layers)
        return layers + self.embedding + self.head + self.final

    @property
    def of_profile(self) -> ProfileModel:
        """The model as a profile names it."""
        return ProfileModel(
            name=Path(self.name).name,
            layers=len(self.layers),
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
        )

    @property
    def kv_matrices(self) -> int:
        """Weights of one layer that make keys and values."""
        return 2 * self.num_kv_heads * self.head_size * self.hidden_size


def read_model(name: str, quantized_ok: bool = False) -> ModelShape:
    """Shape of a preset, of a folder with a `config.json`, or of a model by its name.

    Args:
        quantized_ok: whether the user says how many bytes a weight takes.

    Raises:
        ValueError: for a model that TOKENSELECT does not serve, whose layers cache keys of different
            sizes, or whose weights have unknown sizes.
        OSError: when there is no such model.
    """
    from transformers import AutoConfig

    if preset := json.loads(_PRESETS.read_text()).get(name.lower()):
        config = AutoConfig.for_model(**preset, tie_word_embeddings=False)
    else:
        config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    _refuse(name, text)
    if getattr(config, "quantization_config", None) is not None and not quantized_ok:
        raise ValueError(
            f"the weights of {name} are quantized: say by --weights-dtype how many bytes one takes "
            "(fp8, int4, or a number such as 0.55)"
        )
    return _shape(name, text)


def _refuse(name: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    reasons = {
        "multi-head latent attention": getattr(config, "kv_lora_rank", None) is not None,
        f"layers of {' and '.join(other)}": bool(other),
        "no attention heads": not getattr(config, "num_attention_heads", None),
        "an encoder": bool(getattr(config, "is_encoder_decoder", False)),
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ValueError(f"{name} has {' and '.join(found)}: TOKENSELECT does not serve it")
    uneven = {
        "layers that read the keys of others": bool(getattr(config, "num_kv_shared_layers", 0)),
        "layers whose heads differ": _heads_differ(config),
    }
    found = [reason for reason, present in uneven.items() if present]
    if found:
        raise ValueError(
            f"{name} has {' and '.join(found)}: TOKENSELECT serves it, but the plan knows "
            "layers with caches of one size only. Start a server, whose log says what it allocates."
        )


def _heads_differ(config: Any) -> bool:
    names = ("head_dim", "num_attention_heads", "num_key_value_heads")
    layers = getattr(config, "per_layer_config", None) or ()
    return len({tuple(getattr(layer, name, None) for name in names) for layer in layers}) > 1


def _shape(name: str, config: Any) -> ModelShape:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    windows = _windows(config)
    matrices, vectors = [0] * len(windows), [0] * len(windows)
    for parameter_name, parameter in model.named_parameters():
        found = _LAYER.search(parameter_name)
        if found:
            weights = matrices if parameter.ndim > 1 else vectors
            weights[int(found[1])] += parameter.numel()
    if not all(matrices):
        raise ValueError(f"the weights of {name} cannot be told apart by layer")
    embedding = model.get_input_embeddings().weight.numel()
    head = 0 if config.tie_word_embeddings else model.get_output_embeddings().weight.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = config.num_attention_heads
    experts = getattr(config, "num_experts_per_tok", 0) or 0
    return ModelShape(
        name=name,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        mlp_width=max(
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            experts * (getattr(config, "moe_intermediate_size", 0) or 0),
        ),
        trained_length=config.max_position_embeddings,
        dtype=torch.float16 if config.dtype == torch.float16 else torch.bfloat16,
        layers=tuple(map(LayerShape, matrices, vectors, windows)),
        embedding=embedding,
        head=head,
        final=total - embedding - head - sum(matrices) - sum(vectors),
    )


def _windows(config: Any) -> list[int | None]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
