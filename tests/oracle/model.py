"""A Llama in plain PyTorch, fp32, that attends as the method defines it. The tests' oracle.

Independent of the package on purpose: no paging, no batching, no plan, one request at a time. The
definition is spelled out in `attended_positions`; everything else is an ordinary Llama.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


@dataclass(frozen=True)
class Selection:
    """The method's settings."""

    top_k: int
    n_init: int
    n_local: int
    query_chunk: int
    tail_queries: int
    similarity_threshold: float
    refresh_interval: int
    positions: str = "native"
    dense_layers: int = 0
    anchor_layers: tuple[int, ...] | Literal["all"] = "all"
    min_context: int = 0

    def sees_everything(self, layer: int, chunk: range, prompt_len: int) -> bool:
        """Whether a layer is dense, or a generated token's context, itself included, is short."""
        generated = chunk.start >= prompt_len
        return layer < self.dense_layers or (generated and chunk.stop <= self.min_context)

    def follows(self, layer: int, chunk: range, prompt_len: int) -> bool:
        """Whether a generated token attends to what the last anchor below this layer made it attend to.

        The first layer that selects is always an anchor.
        """
        if self.anchor_layers == "all" or chunk.start < prompt_len:
            return False
        return layer > self.dense_layers and layer not in self.anchor_layers


@dataclass(frozen=True)
class LastSelection:
    """What a layer keeps of the last generated token that selected."""

    query: torch.Tensor
    candidates: range
    chosen: torch.Tensor

    def margin(
        self, query: torch.Tensor, candidates: range, num_kv_heads: int, settings: Selection
    ) -> float:
        """By how much a later token's query is similar enough to attend to what was chosen then.

        Below zero it is not, as when the selection is too old.
        """
        if candidates.stop - self.candidates.stop > settings.refresh_interval:
            return -1.0
        heads = (x.reshape(num_kv_heads, -1) for x in (query, self.query))
        similarity = F.cosine_similarity(*heads, dim=1).min()
        return float(similarity) - settings.similarity_threshold


def query_chunks(first: int, end: int, prompt_len: int, settings: Selection) -> list[range]:
    """Chunks of the positions [first, end): at absolute multiples of `query_chunk`, then one by one."""
    tail = max(prompt_len - settings.tail_queries, 0)
    starts = [p for p in range(first, end) if p >= tail or p % settings.query_chunk == 0]
    assert starts[0] == first, "a chunk is never computed from its middle"
    return [range(a, b) for a, b in zip(starts, [*starts[1:], end], strict=True)]


def attended_positions(
    queries: torch.Tensor,
    keys: torch.Tensor,
    chunk: range,
    scale: float,
    settings: Selection,
    last: LastSelection | None,
    asking: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean,
) -> tuple[torch.Tensor, LastSelection | None, float]:
    """Positions that a chunk attends to, ascending; its own queries see them causally.

    Args:
        queries: [n, Hq, D], the chunk's.
        keys: [Hkv, T, D], every cached key.
        last: the selection that may be reused; None if there is none.
        asking: makes of the mean query the one that votes.

    Returns:
        the positions, the selection that they are from, None if the chunk sees everything, and how
        clearly it was decided whether the last one is reused.
    """
    candidates = range(settings.n_init, chunk.start - settings.n_local)
    everything = torch.arange(chunk.stop)
    if len(candidates) <= settings.top_k:
        return everything, None, 1.0
    mean = queries.mean(dim=0)  # [Hq, D]
    margin = -1.0 if last is None else last.margin(mean, candidates, len(keys), settings)
    if last is None or margin < 0:
        chosen = vote(asking(mean), keys, candidates, scale, settings.top_k)
        last = LastSelection(mean, candidates, chosen)
    attended = torch.zeros(chunk.stop, dtype=torch.bool)
    attended[: settings.n_init] = True
    attended[last.chosen] = True
    attended[last.candidates.stop :] = True
    return everything[attended], last, abs(margin)


def vote(
    mean: torch.Tensor, keys: torch.Tensor, candidates: range, scale: float, top_k: int
) -> torch.Tensor:
    """The candidates with the most votes of a mean query [Hq, D].

    Keys that are not rotated are equal wherever the same token stands, in the first layer at least. So
    that their votes are equal too, and not so but for rounding, they are compared in 16 bits.
    """
    grouped = mean.view(keys.shape[0], -1, mean.shape[1])  # by the KV head they read
    candidate_keys = keys[:, candidates.start : candidates.stop]
    logits = grouped @ candidate_keys.transpose(1, 2) * scale
    votes = logits.softmax(dim=-1).sum(dim=(0, 1)).view(torch.int32) >> 16
    # A stable descending sort leaves the lower position first among equal votes.
    return votes.sort(descending=True, stable=True).indices[:top_k] + candidates.start


class OracleModel:
    """A Llama from a Hugging Face folder.

    Args:
        folder: holds config.json and model.safetensors, tied embeddings.
        settings: the method's; None for full attention.
    """

    def __init__(self, folder: Path, settings: Selection | None) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("model."): w.float() for name, w in weights.items()}
        self.settings = settings or Selection(10**9, 0, 1, 512, 0, 1.0, 0)
        self.num_layers = self.config["num_hidden_layers"]
        self.num_heads = self.config["num_attention_heads"]
        self.num_kv_heads = self.config["num_key_value_heads"]
        self.head_size = self.config["head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"]
        exponent = torch.arange(0, self.head_size, 2).float() / self.head_size
        angles = torch.outer(torch.arange(16384).float(), 1 / theta**exponent)
        self.cos, self.sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.last: list[LastSelection | None] = []
        # What each generated token of this step attends to in the last anchor so far.
        self.anchored: dict[range, torch.Tensor] = {}
        self.prompt_len = 0
        self.num_reused = 0  # selections, over layers and generated tokens
        self.margin = 1.0  # the narrowest decision so far

    @torch.inference_mode()
    def start(self, prompt: list[int]) -> torch.Tensor:
        """Compute a prompt; log-probabilities [vocabulary] of what follows it."""
        self.begin(len(prompt))
        return self.next_logprobs(prompt, 0)

    def begin(
        self, prompt_len: int, cache: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    ) -> None:
        """Make ready for a prompt, whose first tokens' keys and values may be known from another."""
        empty = torch.empty(self.num_kv_heads, 0, self.head_size)
        self.cache = list(cache) or [(empty, empty)] * self.num_layers
        self.last = [None] * self.num_layers
        self.prompt_len = prompt_len

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], max_tokens: int
    ) -> tuple[list[int], list[float], list[float], list[float]]:
        """Greedy decoding.

        Returns:
            tokens, their log-probabilities, how far each was ahead of the second (nats), and the
            narrowest decision to reuse a selection or not that went before it.
        """
        self.margin = 1.0
        margins = []
        tokens, logprobs, leads = [], [], []
        following = self.start(prompt)
        for position in range(len(prompt), len(prompt) + max_tokens):
            best = following.topk(2)
            tokens.append(int(best.indices[0]))
            logprobs.append(float(best.values[0]))
            leads.append(float(best.values[0] - best.values[1]))
            margins.append(self.margin)
            if len(tokens) < max_tokens:
                following = self.next_logprobs(tokens[-1:], position)
        return tokens, logprobs, leads, margins

    @torch.inference_mode()
    def next_logprobs(self, tokens: list[int], first: int) -> torch.Tensor:
        """Log-probabilities [vocabulary] after `tokens`, which stand at positions `first` and on."""
        hidden = self.weights["embed_tokens.weight"][tokens]
        self.anchored = {}
        for layer in range(self.num_layers):
            w = self._layer_weights(layer)
            attended = self._attention(layer, self._norm(hidden, w["input_layernorm"]), first, w)
            hidden = hidden + F.linear(attended, w["self_attn.o_proj"])
            x = self._norm(hidden, w["post_attention_layernorm"])
            gated = F.silu(F.linear(x, w["mlp.gate_proj"])) * F.linear(x, w["mlp.up_proj"])
            hidden = hidden + F.linear(gated, w["mlp.down_proj"])
        last = self._norm(hidden[-1], self.weights["norm.weight"])
        return F.linear(last, self.weights["embed_tokens.weight"]).log_softmax(dim=-1)

    def _attention(self, layer: int, x: torch.Tensor, first: int, w: dict) -> torch.Tensor:
        n, end = len(x), first + len(x)
        q = F.linear(x, w["self_attn.q_proj"]).view(n, self.num_heads, self.head_size)
        k = F.linear(x, w["self_attn.k_proj"]).view(n, self.num_kv_heads, self.head_size)
        v = F.linear(x, w["self_attn.v_proj"]).view(n, self.num_kv_heads, self.head_size)
        reassigned = self.settings.positions == "reassigned"
        if not reassigned:
            q, k = self._rotate(q, first), self._rotate(k, first)
        keys = torch.cat([self.cache[layer][0], k.transpose(0, 1)], dim=1)
        values = torch.cat([self.cache[layer][1], v.transpose(0, 1)], dim=1)
        self.cache[layer] = keys, values
        scale = self.head_size**-0.5
        outputs = []
        for chunk in query_chunks(first, end, self.prompt_len, self.settings):
            queries = q[chunk.start - first : chunk.stop - first]
            seen = self.attend_to(layer, queries, keys[:, : chunk.stop], chunk, scale)
            seen_keys = keys[:, seen]
            if reassigned:
                # What is seen is numbered from 0 in its order, and the chunk's own queries last.
                seen_keys = self._rotate(seen_keys.transpose(0, 1), 0).transpose(0, 1)
                queries = self._rotate(queries, len(seen) - len(queries))
            causal = seen[None] <= torch.arange(chunk.start, chunk.stop)[:, None]
            outputs.append(
                F.scaled_dot_product_attention(
                    queries.transpose(0, 1),
                    seen_keys,
                    values[:, seen],
                    attn_mask=causal,
                    scale=scale,
                    enable_gqa=True,
                ).transpose(0, 1)
            )
        return torch.cat(outputs).reshape(n, -1)

    def attend_to(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, chunk: range, scale: float
    ) -> torch.Tensor:
        """Positions that a chunk attends to in a layer, ascending."""
        settings, prompt_len = self.settings, self.prompt_len
        if settings.follows(layer, chunk, prompt_len):
            return self.anchored[chunk]
        if settings.sees_everything(layer, chunk, prompt_len):
            settings = replace(settings, top_k=10**9)
        # Only generated tokens reuse a selection and leave one.
        generated = chunk.start >= prompt_len
        before = self.last[layer] if generated else None
        seen, last, margin = attended_positions(
            queries, keys, chunk, scale, settings, before, self._asking
        )
        self.margin = min(self.margin, margin)
        self.num_reused += last is not None and last is before
        self.last[layer] = last if generated else None
        self.anchored[chunk] = seen
        return seen

    def _asking(self, mean: torch.Tensor) -> torch.Tensor:
        """The mean query [Hq, D] as it votes: reassigned, all keys stand `n_local` tokens before it."""
        if self.settings.positions == "reassigned":
            return self._rotate(mean[None], self.settings.n_local)[0]
        return mean

    def _rotate(self, x: torch.Tensor, first: int) -> torch.Tensor:
        cos, sin = (t[first : first + len(x), None] for t in (self.cos, self.sin))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])

    def _layer_weights(self, layer: int) -> dict[str, torch.Tensor]:
        prefix = f"layers.{layer}."
        return {
            name.removeprefix(prefix).removesuffix(".weight"): weight
            for name, weight in self.weights.items()
            if name.startswith(prefix)
        }
