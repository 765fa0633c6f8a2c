"""Take the rotation of queries and keys over from the model, where positions are reassigned.

A layer's rotary embedding stands beside the layer in the same module. Once a model is loaded, each of them
is replaced by a pass-through. `rotary_probe` then sends a few tokens through the model. It checks that
every layer gets its queries and keys straight from its own pass-through, whatever their positions; the
layer then takes over the embedding's table. A layer that calls no embedding, and whose queries and keys
are the same at all positions, has no rotation to take over (NoPE). The layers of a model that vLLM runs in
transformers' own code share one embedding: `transformers_rope`.

Wraps `process_weights_after_loading` as `BaseModelLoader.load_model` calls it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks import transformers_rope
from vllm_tokenselect.hooks.rotary_kinds import (
    AttentionLayer,
    Unrotated,
    attention_layers,
    extend_table,
    rotate_alike,
    table_of,
    unusable,
)
from vllm_tokenselect.hooks.rotary_probe import Probe, Trial, same
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.settings import SettingsError

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
    calls="process_weights_after_loading",
    why="takes the rotation of queries and keys over from the model where positions are reassigned",
    retired_by="vLLM lets an attention backend rotate queries and keys in the model's stead",
)


SCALED = (
    "queries are scaled by their position in the text, unless --max-model-len stays within the context "
    "in which they are not"
)
ELSEWHERE = (
    "positions reach queries and keys in another way than a rotary embedding beside the layer"
)
LEARNED = "positions are added to the hidden states (learned or sinusoidal ones)"
UNSEEN = "the layer is not called, or not with queries and keys, when the model reads text"


def take_over(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
    """Take the rotation over from a loaded model; layers that do not reassign positions keep theirs.

    Raises:
        SettingsError: naming the layers whose rotation cannot be taken over, and why.
    """
    layers = list(attention_layers(model))
    reassigning = [layer for layer in layers if layer.reassigns]
    if not reassigning:
        return
    model.eval()  # as vLLM does next; dropout would give other numbers each time
    probe = Probe(model, vllm_config, device, layers)
    shared = transformers_rope.find(model)
    if shared is not None and not any(layer.embeddings() for layer in layers):
        _take_shared(probe, *shared)
    else:
        _take_each(probe, reassigning)
    for layer in layers:
        if not layer.reassigns:
            extend_table(layer, vllm_config.model_config.max_model_len)
    rotating = sum(layer.attention.impl.rotation is not None for layer in reassigning)
    get_logger(__name__).info(
        "TOKENSELECT rotates the queries and keys of %d attention layers in the model's stead; %d layers "
        "have no positions.",
        rotating,
        len(reassigning) - rotating,
    )


def _take_each(probe: Probe, layers: list[AttentionLayer]) -> None:
    """Take the rotation of layers that have a rotary embedding of vLLM beside each, or none."""
    beside: dict[Any, list[tuple[str, Any]]] = {layer.owner: layer.embeddings() for layer in layers}
    for owner, found in beside.items():
        for name, embedding in found:
            setattr(owner, name, Unrotated(embedding))
        if hasattr(owner, "use_fused_qk_norm_rope_gate"):
            # Qwen3-Next: a kernel for GPUs, which reads the embedding's table by itself.
            owner.use_fused_qk_norm_rope_gate = False
    trials = _try(probe, layers)
    problems: dict[str, list[str]] = {}  # what is wrong, and with which layers
    taken: dict[Any, Any] = {}  # embeddings; None for layers without positions
    for layer in layers:
        called = trials[layer.name].given is not None
        embeddings = [embedding for _, embedding in beside[layer.owner]] if called else []
        taken[layer.attention] = embeddings[0] if called else None
        if problem := _take_one(probe.vllm_config, layer, embeddings, taken):
            problems.setdefault(problem, []).append(layer.name)
    _refuse(probe.model, problems)


def _take_one(
    vllm_config: VllmConfig, layer: AttentionLayer, embeddings: list[Any], taken: dict[Any, Any]
) -> str | None:
    """Take the rotation of a layer that calls these embeddings.

    Args:
        taken: the embedding of each attention so far, this one included.

    Returns:
        why it cannot be taken; None if it was.
    """
    impl = layer.attention.impl
    if len(embeddings) > 1:
        return f"{len(embeddings)} rotary embeddings beside the attention layer"
    for embedding in embeddings:
        if problem := unusable(embedding, vllm_config.model_config):
            return problem
    # Keys are rotated where they are attended, by the layer that reads them.
    if impl.writer is not None and not (
        impl.writer in taken and rotate_alike(taken[layer.attention], taken[impl.writer])
    ):
        return f"other positions than in {impl.writer.layer_name}, whose keys are read"
    most = impl.config.method.max_attended
    try:
        impl.take_rotation(table_of(embeddings[0], vllm_config, most) if embeddings else None)
    except ValueError as error:  # the table is too short
        return str(error)
    return None


def _try(probe: Probe, layers: list[AttentionLayer]) -> dict[str, Trial]:
    """Send tokens of several positions through the model.

    Returns:
        of each layer, what it did with the first.

    Raises:
        SettingsError: naming the layers that attend with something else than what comes from their
            embeddings, or that positions reach in another way.
    """
    seen: dict[str, list[Trial]] = {layer.name: [] for layer in layers}
    entered = []
    for run in probe.runs():
        entered.append(run.entered)
        for layer in layers:
            if layer.name in run.trials:
                seen[layer.name].append(run.trials[layer.name])
        problems: dict[str, list[str]] = {}
        if not all(same((entered[0], None), (entered[-1], None))):
            problems[LEARNED] = [layer.name for layer in layers]
        else:
            for name, trials in seen.items():
                if problem := _problem_with(trials):
                    problems.setdefault(problem, []).append(name)
        _refuse(probe.model, problems)
    return {name: trials[0] for name, trials in seen.items()}


def _problem_with(trials: list[Trial]) -> str | None:
    """What is wrong with a layer, by its trials at several positions; the first trial is at position 0."""
    if not trials:
        return UNSEEN
    first = trials[0]
    if first.given is not None and not all(same(first.attended, first.given)):
        return transformers_rope.CHANGED
    queries, keys = True, True
    for trial in trials[1:]:
        comparisons = [same(trial.made, first.made)]
        if trial.given is not None:
            comparisons.append(same(trial.attended, trial.given))
        queries = queries and all(query for query, _ in comparisons)
        keys = keys and all(key for _, key in comparisons)
    if not keys:
        return ELSEWHERE
    return None if queries else SCALED


def _take_shared(probe: Probe, name: str, embedding: Any) -> None:
    """Take the rotation of a model in transformers' code, whose layers share one rotary embedding."""
    layers = probe.layers
    problems: dict[str, list[str]] = {}
    if transformers_rope.changes_with_the_length(embedding):
        problems[f"rotation of the type {embedding.rope_type!r}"] = [name]
    problems["layers that stay on vLLM's default backend share its rotary embedding"] = [
        layer.name for layer in layers if not layer.reassigns
    ]
    _refuse(probe.model, problems)
    parent, _, attribute = name.rpartition(".")
    rotated = 2 * len(embedding.inv_freq)
    angles = transformers_rope.FixedAngles(rotated)
    setattr(probe.model.get_submodule(parent), attribute, angles)
    unrotated = _try(probe, layers)
    with angles.turned():
        turned = probe.run(0).trials
    method = layers[0].attention.impl.config.method
    dtype = probe.vllm_config.model_config.dtype
    table = transformers_rope.table_of(embedding, method.max_attended, dtype)
    for layer in layers:
        before, after = unrotated[layer.name].attended, turned[layer.name].attended
        if all(same(before, after)):
            layer.attention.impl.take_rotation(None)
            continue
        head_size = layer.attention.impl.head_size
        problem = transformers_rope.problem_with(before, after, head_size, rotated)
        if problem is not None:
            problems.setdefault(problem, []).append(layer.name)
            continue
        layer.attention.impl.take_rotation(table)
    _refuse(probe.model, problems)


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


def _process_and_take_over(
    process_weights: Any, model: nn.Module, model_config: Any, device: torch.device
) -> None:
    from vllm.config import get_current_vllm_config

    process_weights(model, model_config, device)
    take_over(model, get_current_vllm_config(), device)


def install() -> None:
    """Wrap vLLM's function; safe to call again."""
    SEAM.wrap(_process_and_take_over)
