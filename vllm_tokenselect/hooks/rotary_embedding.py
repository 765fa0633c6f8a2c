"""Take the rotation of queries and keys over from the model, where positions are reassigned.

Once a model is loaded, each attention layer's rotary embedding, which stands beside the layer in the same
module, is replaced by a pass-through, and its table handed to the layer. One token is then sent through
the model, to see that every layer gets its queries and keys straight from its own pass-through: a
model may hold an embedding that it does not use (layers without positions), or go on working on what
is rotated. Wraps `process_weights_after_loading` as `BaseModelLoader.load_model` calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_tokenselect.hooks.log import get_logger
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method import SettingsError

logger = get_logger(__name__)

SEAM = Seam(
    name="rotary_embedding",
    module="vllm.model_executor.model_loader.base_loader",
    qualname="BaseModelLoader.load_model",
    parameters=("self", "vllm_config", "model_config"),
    contains=(
        "process_weights_after_loading(model, model_config, target_device)",
        "return model.eval()",
    ),
    why="takes the rotation of queries and keys over from the model where positions are reassigned",
)


class Unrotated(nn.Module):
    """Stands where a model's rotary embedding was; the layer rotates what it attends to.

    Args:
        embedding: what it stands for. Where that pairs neighbouring elements, a head's elements are put
            in the order in which pairs are half of the rotated part apart; products of queries and
            keys stay as they are.
    """

    order: torch.Tensor | None

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.head_size = embedding.head_size
        order = None
        if not embedding.is_neox_style:
            rotated = torch.arange(embedding.rotary_dim)
            rest = torch.arange(embedding.rotary_dim, embedding.head_size)
            order = torch.cat([rotated[0::2], rotated[1::2], rest])
            order = order.to(embedding.cos_sin_cache.device)
        self.register_buffer("order", order, persistent=False)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`query` and `key` [..., heads * D] or [..., heads, D], as the embedding takes them."""
        return self._ordered(query), self._ordered(key)

    def _ordered(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return vectors
        return vectors.view(-1, self.head_size)[:, self.order].view(vectors.shape)


class AttentionLayer(NamedTuple):
    """A layer of the model that attends, and the module that calls it."""

    name: str
    attention: Any
    owner: nn.Module

    @property
    def reassigns(self) -> bool:
        return hasattr(self.attention.impl, "take_rotation")

    def embeddings(self) -> list[tuple[str, Any]]:
        """Rotary embeddings beside the layer, with their names."""
        return [
            (name, child)
            for name, child in self.owner.named_children()
            if type(child).__module__.startswith("vllm.model_executor.layers.rotary_embedding")
        ]


def take_over(model: nn.Module, vllm_config: Any, device: torch.device) -> None:
    """Take the rotation over from a loaded model; layers that do not reassign positions keep theirs.

    Raises:
        SettingsError: naming the layers whose rotation cannot be taken over, and why.
    """
    layers = list(_attention_layers(model))
    reassigning = [layer for layer in layers if layer.reassigns]
    if not reassigning:
        return
    problems: dict[str, list[str]] = {}  # what is wrong, and with which layers
    replaced: dict[str, Unrotated] = {}
    for layer in reassigning:
        problem = _unusable(layer.embeddings())
        if problem is not None:
            problems.setdefault(problem, []).append(layer.name)
            continue
        [(name, embedding)] = layer.embeddings()
        try:
            layer.attention.impl.take_rotation(embedding.cos_sin_cache)
        except ValueError as error:
            problems.setdefault(str(error), []).append(layer.name)
            continue
        replaced[layer.name] = Unrotated(embedding)
        setattr(layer.owner, name, replaced[layer.name])
    _refuse(model, problems)
    _refuse(model, _try(model, vllm_config, device, reassigning, replaced))
    for layer in layers:
        if not layer.reassigns:
            _extend_table(layer, vllm_config.model_config.max_model_len)
    logger.info(
        "TOKENSELECT rotates the queries and keys of %d attention layers in the model's stead.",
        len(reassigning),
    )


def _attention_layers(model: nn.Module) -> Iterator[AttentionLayer]:
    from vllm.model_executor.layers.attention import Attention

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            yield AttentionLayer(name, module, model.get_submodule(name.rpartition(".")[0]))


def _unusable(embeddings: list[tuple[str, Any]]) -> str | None:
    """Why these cannot be the rotary embedding of a layer; None if they can."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    if not embeddings:
        return "no rotary embedding beside the attention layer"
    if len(embeddings) > 1:
        return f"{len(embeddings)} rotary embeddings beside the attention layer"
    kind = type(embeddings[0][1])
    if getattr(kind, "forward_native", None) is not RotaryEmbedding.forward_native:
        return f"{kind.__name__} rotates in a way of its own"
    return None


def _try(
    model: nn.Module,
    vllm_config: Any,
    device: torch.device,
    layers: list[AttentionLayer],
    replaced: dict[str, Unrotated],
) -> dict[str, list[str]]:
    """Send one token through the model, not compiled, as vLLM's own profiling run sends many.

    Returns:
        problems, and the layers that have them: those that did not get their queries and keys as
        their pass-through gave them.
    """
    from vllm.forward_context import set_forward_context

    given: dict[str, tuple[torch.Tensor, ...]] = {}
    attended: dict[str, bool] = {}

    def note_given(name: str, output: tuple[torch.Tensor, ...]) -> None:
        given[name] = tuple(vectors.flatten().clone() for vectors in output)

    def note_attended(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key = [*args, kwargs.get("query"), kwargs.get("key")][:2]
        attended[name] = name in given and all(
            torch.allclose(x.flatten(), y, rtol=0, atol=0, equal_nan=True)
            for x, y in zip((query, key), given.pop(name), strict=True)
        )

    hooks = []
    for layer in layers:
        on_given = functools.partial(note_given, layer.name)
        on_attended = functools.partial(note_attended, layer.name)
        hooks += [
            replaced[layer.name].register_forward_hook(lambda m, i, output, f=on_given: f(output)),
            layer.attention.register_forward_pre_hook(
                lambda m, args, kwargs, f=on_attended: f(args, kwargs), with_kwargs=True
            ),
        ]
    token = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        with (
            torch.inference_mode(),
            set_forward_context(None, vllm_config, num_tokens=1, skip_compiled=True),
        ):
            model(input_ids=token.int(), positions=token)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [layer.name for layer in layers if not attended.get(layer.name)]
    problem = "the model does not rotate queries and keys directly before it attends"
    return {problem: wrong} if wrong else {}


def _refuse(model: nn.Module, problems: dict[str, list[str]]) -> None:
    if problems:
        found = "; ".join(f"{problem} ({_some(names)})" for problem, names in problems.items())
        raise SettingsError(
            f"tokenselect positions='reassigned' cannot serve {type(model).__name__}: {found}. "
            "Leave positions out of the settings for this model."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _extend_table(layer: AttentionLayer, max_model_len: int) -> None:
    """Give a layer that keeps its rotation, such as a sliding-window one, positions to the end.

    It never sees two tokens that are further apart than it was trained on, but their positions in the text
    pass the end of its table.
    """
    from vllm.model_executor.layers import rotary_embedding as kinds

    for _, embedding in layer.embeddings():
        if len(embedding.cos_sin_cache) >= max_model_len:
            continue
        # Of the other kinds, some change with the length that they are made for.
        if type(embedding) not in (kinds.RotaryEmbedding, kinds.Llama3RotaryEmbedding):
            raise SettingsError(
                f"--max-model-len {max_model_len} passes the rotary table of {layer.name}, which stays on "
                f"vLLM's default backend and is of a kind that cannot be made longer "
                f"({type(embedding).__name__}, {len(embedding.cos_sin_cache)} positions). Set "
                f"--max-model-len to {len(embedding.cos_sin_cache)}."
            )
        embedding.max_position_embeddings = max_model_len
        table = embedding._compute_cos_sin_cache()
        embedding.cos_sin_cache = table.to(embedding.cos_sin_cache)


def install() -> None:
    """Wrap vLLM's function; safe to call again, also while a model is being loaded."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading
    if SEAM.require() == "patched" or hasattr(process, "_tokenselect"):
        return

    @functools.wraps(process)
    def process_and_take_over(model: nn.Module, model_config: Any, device: torch.device) -> None:
        process(model, model_config, device)
        take_over(model, get_current_vllm_config(), device)

    process_and_take_over._tokenselect = True  # type: ignore[attr-defined]
    base_loader.process_weights_after_loading = process_and_take_over
