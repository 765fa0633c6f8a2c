"""Take the rotation of queries and keys over from the model, where positions are reassigned.

Once a model is loaded, each attention layer's rotary embedding, which stands beside the layer in the same
module, is replaced by a pass-through, and its table handed to the layer. A few tokens are then sent through
the model, to see that every layer gets its queries and keys straight from its own pass-through: a
model may hold an embedding that it does not use (layers without positions), or go on working on what
is rotated. Models that vLLM runs in transformers' own code share one embedding: `transformers_rope`.

Wraps `process_weights_after_loading` as `BaseModelLoader.load_model` calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vllm_tokenselect.hooks import transformers_rope
from vllm_tokenselect.hooks.log import get_logger
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.hooks.transformers_rope import Inputs
from vllm_tokenselect.method import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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


NUM_TRIED = 8  # tokens that a model is tried with
_NOT_DIRECTLY = "the model does not rotate queries and keys directly before it attends"


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
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`query` and `key` [..., heads * D] or [..., heads, D], as the embedding takes them.

        A layer that reads the keys of another one has none.
        """
        return self._ordered(query), None if key is None else self._ordered(key)

    def _ordered(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return vectors
        return vectors.reshape(-1, self.head_size)[:, self.order].view(vectors.shape)


class AttentionLayer(NamedTuple):
    """A layer of the model that attends, and the module that calls it."""

    name: str
    attention: Any
    owner: nn.Module

    @property
    def reassigns(self) -> bool:
        return getattr(self.attention.impl, "reassigns_positions", False)

    def embeddings(self) -> list[tuple[str, Any]]:
        """Rotary embeddings beside the layer, with their names."""
        return [
            (name, child)
            for name, child in self.owner.named_children()
            if type(child).__module__.startswith("vllm.model_executor.layers.rotary_embedding")
        ]


def take_over(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
    """Take the rotation over from a loaded model; layers that do not reassign positions keep theirs.

    Raises:
        SettingsError: naming the layers whose rotation cannot be taken over, and why.
    """
    layers = list(_attention_layers(model))
    reassigning = [layer for layer in layers if layer.reassigns]
    if not reassigning:
        return
    shared = transformers_rope.find(model)
    if shared is not None and not any(layer.embeddings() for layer in layers):
        _take_shared(model, vllm_config, device, layers, *shared)
    else:
        _take_each(model, vllm_config, device, reassigning)
    for layer in layers:
        if not layer.reassigns:
            _extend_table(layer, vllm_config.model_config.max_model_len)
    get_logger(__name__).info(
        "TOKENSELECT rotates the queries and keys of %d attention layers in the model's stead.",
        len(reassigning),
    )


def _take_each(
    model: nn.Module, vllm_config: VllmConfig, device: torch.device, layers: list[AttentionLayer]
) -> None:
    """Take the rotation of layers that have a rotary embedding of vLLM beside each."""
    problems: dict[str, list[str]] = {}  # what is wrong, and with which layers
    replaced: dict[str, Unrotated] = {}
    taken: dict[Any, Any] = {}
    for layer in layers:
        found = layer.embeddings()
        problem = _unusable(found)
        if problem is None:
            [(name, embedding)] = found
            try:
                layer.attention.impl.take_rotation(embedding.cos_sin_cache)
            except ValueError as error:  # its table is too short
                problem = str(error)
            taken[layer.attention] = embedding
            # Keys are rotated where they are attended, by the layer that reads them.
            writer = layer.attention.impl.writer
            if writer is not None and not _rotate_alike(embedding, taken.get(writer)):
                problem = f"other positions than in {writer.layer_name}, whose keys are read"
        if problem is not None:
            problems.setdefault(problem, []).append(layer.name)
            continue
        replaced[layer.name] = Unrotated(embedding)
        setattr(layer.owner, name, replaced[layer.name])
    _refuse(model, problems)
    given: dict[str, Inputs] = {}

    def give_numbers(name: str, output: tuple[torch.Tensor | None, ...]) -> Any:
        """Numbers in place of queries and keys, which could be zero where nothing has been attended."""
        numbers = [
            None if x is None else _numbers(x, size) for size, x in zip((1, 2), output, strict=True)
        ]
        given[name] = _flat_copies(numbers)
        return tuple(numbers)

    hooks = [
        unrotated.register_forward_hook(
            lambda module, args, output, name=name: give_numbers(name, output)
        )
        for name, unrotated in replaced.items()
    ]
    try:
        attended = _run_some_tokens(model, vllm_config, device, layers)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [
        layer.name
        for layer in layers
        if layer.name not in given
        or layer.name not in attended
        or not all(
            torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
            for x, y in zip(attended[layer.name], given[layer.name], strict=True)
        )
    ]
    _refuse(model, {_NOT_DIRECTLY: wrong})


def _take_shared(
    model: nn.Module,
    vllm_config: VllmConfig,
    device: torch.device,
    layers: list[AttentionLayer],
    name: str,
    embedding: Any,
) -> None:
    """Take the rotation of a model in transformers' code, whose layers share one rotary embedding."""
    problems: dict[str, list[str]] = {}
    if transformers_rope.changes_with_the_length(embedding):
        problems[f"rotation of the type {embedding.rope_type!r}"] = [name]
    problems["layers that stay on vLLM's default backend share its rotary embedding"] = [
        layer.name for layer in layers if not layer.reassigns
    ]
    _refuse(model, problems)
    first = layers[0].attention.impl
    table = transformers_rope.table_of(
        embedding, first.config.method.max_attended, vllm_config.model_config.dtype
    )
    for layer in layers:
        layer.attention.impl.take_rotation(table)
    wrong = transformers_rope.take_over(
        model,
        name,
        embedding,
        {layer.name: layer.attention.impl.head_size for layer in layers},
        functools.partial(_run_some_tokens, model, vllm_config, device, layers),
    )
    _refuse(model, {_NOT_DIRECTLY: wrong})


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


def _rotate_alike(embedding: Any, other: Any) -> bool:
    return embedding is other or (
        other is not None
        and embedding.is_neox_style == other.is_neox_style
        and torch.equal(embedding.cos_sin_cache, other.cos_sin_cache)
    )


def _run_some_tokens(
    model: nn.Module, vllm_config: VllmConfig, device: torch.device, layers: list[AttentionLayer]
) -> dict[str, Inputs]:
    """Send a few tokens through the model, not compiled, as vLLM's own profiling run sends many.

    Tokens from all over the vocabulary: the embedding of some, such as padding, may be zero.

    Returns:
        the queries and the keys that each layer attends with, flat, or the queries alone of one that
        reads the keys of another; without layers where they are zero, which would tell nothing.
    """
    from vllm.forward_context import set_forward_context

    attended: dict[str, Inputs] = {}

    def note(layer: AttentionLayer, forward: Any, *args: Any, **kwargs: Any) -> Any:
        query, key = [*args, kwargs.get("query"), kwargs.get("key")][:2]
        attended[layer.name] = _flat_copies([query, key])
        return forward(*args, **kwargs)

    last = vllm_config.model_config.get_vocab_size() - 1
    # Models are loaded under a default dtype of their own, in which the last token may be rounded up.
    tokens = torch.linspace(0, last, NUM_TRIED, dtype=torch.float64, device=device).int()
    positions = torch.arange(NUM_TRIED, device=device)
    more = _earlier_stage(model, vllm_config, device)
    for layer in layers:
        # Not a forward hook: transformers' code calls `forward` itself.
        forward = layer.attention.forward
        layer.attention.forward = functools.partial(note, layer, forward)
    try:
        with (
            torch.inference_mode(),
            set_forward_context(None, vllm_config, num_tokens=NUM_TRIED, skip_compiled=True),
        ):
            model(input_ids=tokens, positions=positions, **more)
    finally:
        for layer in layers:
            del layer.attention.forward
    return {name: inputs for name, inputs in attended.items() if all(x.any() for x in inputs)}


def _flat_copies(inputs: Sequence[torch.Tensor | None]) -> Inputs:
    return tuple(x.flatten().clone() for x in inputs if x is not None)


def _earlier_stage(
    model: nn.Module, vllm_config: VllmConfig, device: torch.device
) -> dict[str, Any]:
    """What a later pipeline stage is called with as well: hidden states, here any numbers but zeros."""
    from vllm.distributed import get_pp_group

    if get_pp_group().is_first_rank:
        return {}
    dtype = vllm_config.model_config.dtype
    states = model.make_empty_intermediate_tensors(NUM_TRIED, dtype, device)  # type: ignore[operator]
    for tensor in states.tensors.values():
        tensor.copy_(_numbers(tensor, 1))
    return {"intermediate_tensors": states}


def _numbers(like: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers from `-size` to `size`, of the shape, dtype and device of a tensor."""
    numbers = torch.linspace(-size, size, like.numel(), dtype=like.dtype, device=like.device)
    return numbers.view_as(like)


def _refuse(model: nn.Module, problems: dict[str, list[str]]) -> None:
    """Refuse the model if any layer has one of the problems."""
    found = [f"{problem} ({_some(names)})" for problem, names in problems.items() if names]
    if found:
        raise SettingsError(
            f"tokenselect positions='reassigned' cannot serve {type(model).__name__}: "
            f"{'; '.join(found)}. "
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
    # Every layer asks; the check reads vLLM's source.
    if hasattr(process, "_tokenselect") or SEAM.require() == "patched":
        return

    @functools.wraps(process)
    def process_and_take_over(model: nn.Module, model_config: Any, device: torch.device) -> None:
        process(model, model_config, device)
        take_over(model, get_current_vllm_config(), device)

    process_and_take_over._tokenselect = True  # type: ignore[attr-defined]
    base_loader.process_weights_after_loading = process_and_take_over
