"""A few tokens sent through a loaded model: what each layer attends with, and what positions do to it.

Nothing but positions has an influence. The module that calls a layer gets the same numbers every time,
whatever came before it. The stand-ins of rotary embeddings give numbers that are recognized when a layer
attends with them. Attention gives fixed numbers, too. No table of positions is read, so positions may be as
large as those of a request can become.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vllm_tokenselect.hooks.rotary_kinds import AttentionLayer, Unrotated, is_rotary_embedding

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NUM_TRIED = 8  # tokens

# Queries and keys, flat; no keys where a layer reads another's.
Inputs = tuple[torch.Tensor | None, torch.Tensor | None]


class Trial(NamedTuple):
    """What one layer did with the tokens.

    Attributes:
        made: queries and keys as they came to the layer's stand-in, or to the attention where none was
            called.
        given: what the stand-in gave in their place; None where none was called.
        attended: what the layer attended with.
    """

    made: Inputs
    given: Inputs | None
    attended: Inputs


class Run(NamedTuple):
    """What one run through the model showed.

    Attributes:
        trials: one of each layer that was called, by the layer's name.
        entered: hidden states that came to the first layer that looks at other tokens.
    """

    trials: dict[str, Trial]
    entered: torch.Tensor | None


class Probe:
    """Sends tokens through a model, not compiled, as vLLM's own profiling run sends many.

    Args:
        layers: all of the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        vllm_config: VllmConfig,
        device: torch.device,
        layers: list[AttentionLayer],
    ) -> None:
        self.model, self.vllm_config, self.device = model, vllm_config, device
        self.layers = layers

    def run(self, first_position: int) -> Run:
        """Send tokens with positions from `first_position` on."""
        from vllm.forward_context import set_forward_context

        watched = _Watched(self.model, self.layers, first_position)
        positions = torch.arange(first_position, first_position + NUM_TRIED, device=self.device)
        config = self.vllm_config.model_config
        if config.uses_mrope:
            positions = positions.expand(config.mrope_num_dims, -1).contiguous()
        with (
            watched.hooked(),
            torch.inference_mode(),
            set_forward_context(None, self.vllm_config, num_tokens=NUM_TRIED, skip_compiled=True),
        ):
            self.model(input_ids=self._tokens(), positions=positions, **self._earlier_stage())
        return Run(watched.trials, watched.entered)

    def runs(self) -> Iterator[Run]:
        """Runs with other positions each: the first ones, some more, and the last of a long request.

        The last ones come last: a model may have a table of positions that do not reach so far.
        """
        last = self.vllm_config.model_config.max_model_len - NUM_TRIED
        return (self.run(first) for first in (0, min(NUM_TRIED, last), last))

    def _tokens(self) -> torch.Tensor:
        """From all over the vocabulary: the embedding of some, such as padding, may be zero."""
        last = self.vllm_config.model_config.get_vocab_size() - 1
        # Models are loaded under a default dtype of their own, in which the last may be rounded up.
        return torch.linspace(0, last, NUM_TRIED, dtype=torch.float64, device=self.device).int()

    def _earlier_stage(self) -> dict[str, Any]:
        """Further arguments of a later pipeline stage: hidden states, here any numbers."""
        from vllm.distributed import get_pp_group

        if get_pp_group().is_first_rank:
            return {}
        dtype = self.vllm_config.model_config.dtype
        make: Any = self.model.make_empty_intermediate_tensors
        states = make(NUM_TRIED, dtype, self.device)
        for tensor in states.tensors.values():
            tensor.copy_(_numbers(tensor, 1))
        return {"intermediate_tensors": states}


class _Watched:
    """A model whose layers are fed with numbers and watched."""

    def __init__(self, model: nn.Module, layers: list[AttentionLayer], shift: int) -> None:
        self.model, self.layers, self.shift = model, layers, shift
        self.trials: dict[str, Trial] = {}
        self.entered: torch.Tensor | None = None
        # What the stand-in beside a layer was called with, and what it gave.
        self.rotations: dict[nn.Module, tuple[Inputs, Inputs]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        owners = {layer.owner for layer in self.layers}
        attending = {layer.attention for layer in self.layers}
        with ExitStack() as stack:

            def register(handle: Any) -> None:
                stack.callback(handle.remove)

            for owner in owners:
                feed = owner.register_forward_pre_hook(self._feed_owner, with_kwargs=True)
                register(feed)
            for module in self.model.modules():
                if isinstance(module, AttentionLayerBase) and module not in attending:
                    hook = module.register_forward_pre_hook(self._note_entered, with_kwargs=True)
                    register(hook)
                elif is_rotary_embedding(module):
                    stack.enter_context(_replaced(module, self._show_positions))
            for owner in owners:
                for child in owner.children():
                    if isinstance(child, Unrotated):
                        register(
                            child.register_forward_hook(functools.partial(self._rotate, owner))
                        )
            for layer in self.layers:
                # Not a hook: transformers' code calls `forward` itself.
                stack.enter_context(
                    _replaced(layer.attention, functools.partial(self._attend, layer))
                )
            yield

    def _note_entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.entered is None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            states = bound.get("hidden_states", next(iter(bound.values()), None))
            if isinstance(states, torch.Tensor):
                self.entered = states.clone()

    def _feed_owner(self, owner: nn.Module, args: Any, kwargs: Any) -> None:
        self._note_entered(owner, args, kwargs)
        self.rotations.pop(owner, None)
        for value in (*args, *kwargs.values()):
            # In place: it may be a buffer for the output.
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.copy_(_numbers(value, 1))

    def _show_positions(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the place of an embedding that stays: what it gives changes from run to run."""
        return query + self.shift, None if key is None else key + self.shift

    def _rotate(self, owner: nn.Module, module: nn.Module, args: Any, output: Any) -> Any:
        """Give numbers in place of queries and keys."""
        _, query, key = (*args, None)[:3]
        given_query = _numbers(output[0], 1)
        given_key = None if output[1] is None else _numbers(output[1], 2)
        self.rotations[owner] = _flat(query, key), _flat(given_query, given_key)
        return given_query, given_key

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Note what a layer attends with, and give numbers in place of what it would return."""
        attended = _flat(query, key)
        made, given = self.rotations.get(layer.owner, (attended, None))
        self.trials[layer.name] = Trial(made, given, attended)
        attention = layer.attention
        if output_shape is None:
            width = attention.num_heads * attention.head_size_v
            output_shape = torch.Size(
                (query.numel() // (attention.num_heads * attention.head_size), width)
            )
        out = torch.empty(output_shape, dtype=output_dtype or query.dtype, device=query.device)
        return _numbers(out, 1).view(-1, output_shape[-1])


def same(first: Inputs, second: Inputs) -> tuple[bool, bool]:
    """Whether queries are the same to the bit, and whether keys are."""
    query, key = (
        x is y
        or (
            x is not None and y is not None and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        )
        for x, y in zip(first, second, strict=True)
    )
    return query, key


@contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _flat(query: torch.Tensor, key: torch.Tensor | None) -> Inputs:
    # Copies: models may go on working in place.
    return query.flatten().clone(), None if key is None else key.flatten().clone()


def _numbers(like: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers from `-size` to `size`, of the shape, dtype and device of a tensor."""
    numbers = torch.linspace(-size, size, like.numel(), dtype=like.dtype, device=like.device)
    return numbers.view(like.shape)
