"""Greedy decoding, token by token and with drafts of the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from benchmarks.self_speculation.attention import DraftAttention, attend_in_full
from vllm_tokenselect.tools.inspect.model import DiagnosedModel


class Buffer(DynamicLayer):
    """Keys and values of a layer in memory for `room` tokens, of which the last can be taken back."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (*key_states.shape[:2], self._room, key_states.shape[3])
        self.keys, self.values = key_states.new_empty(2, *shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, begin : self.length] = key_states
        self.values[:, :, begin : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


class Sequence:
    """A sequence that a model has read but for its last token."""

    def __init__(self, model: DiagnosedModel, prompt: list[int], room: int) -> None:
        self._model = model
        self._layers = [Buffer(room) for _ in range(model.text_config.num_hidden_layers)]
        self._cache = Cache(layers=self._layers)
        model.extend(self._cache, prompt[:-1])

    def __len__(self) -> int:
        return self._layers[0].length

    def take_back(self, length: int) -> None:
        """Be as long as before what was read last."""
        for layer in self._layers:
            layer.length = length

    def read(self, tokens: list[int], attention: Any = attend_in_full) -> list[int]:
        """The likeliest token behind each of these."""
        said: list[int] = self._model.extend(self._cache, tokens, attention).argmax(-1).tolist()
        return said


@dataclass
class Decoded:
    """Generated tokens, and how they came about."""

    tokens: list[int]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


def decode(sequence: Sequence, last: int, count: int) -> Decoded:
    """The next `count` tokens, each with full attention."""
    tokens: list[int] = []
    while len(tokens) < count:
        [last] = sequence.read([last])
        tokens.append(last)
    return Decoded(tokens)


def speculate(
    sequence: Sequence, last: int, count: int, drafts: int, attention: DraftAttention
) -> Decoded:
    """The same tokens: the model drafts some of them, and verifies all at once with full attention."""
    done = Decoded([])
    while len(done.tokens) < count:
        begin, asked = len(sequence), [last]
        attention.begin_round()
        for _ in range(min(drafts, count - len(done.tokens) - 1)):
            asked += sequence.read(asked[-1:], attention)
        sequence.take_back(begin)
        said = sequence.read(asked)
        wrong = [i for i, draft in enumerate(asked[1:]) if draft != said[i]]
        accepted = wrong[0] if wrong else len(asked) - 1
        sequence.take_back(begin + accepted + 1)
        last = said[accepted]
        done.tokens += said[: accepted + 1]
        done.rounds += 1
        done.drafted += len(asked) - 1
        done.accepted += accepted
    return done
