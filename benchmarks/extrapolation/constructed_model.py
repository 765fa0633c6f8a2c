"""A Llama of two layers that recalls exactly, its weights constructed instead of trained.

    python -m benchmarks.extrapolation.constructed_model FOLDER

Asked with two tokens that stood together once before, it says the token that followed them there. It
knows nothing else, and what it knows is exact, so that a wrong answer is the attention's fault and
never the model's.

Every token has a code, a vector of +1 and -1. A hidden state has three parts of a code's size:

    own         the code of the token here; layer 1 adds to it the code of the answer
    previous    the code of the token before, put here by layer 0
    second      the code of the token before that, put here by layer 0

Layer 0 finds tokens by distance alone. All queries are the same, and all keys; they differ by their
rotation. In the fastest RoPE pairs the query is turned back by an offset `o`, so that the logit of a key
at distance `d` is a sum of `cos((d - o) * theta)`, which has its peak at `d = o`: 1 for the first KV head,
2 for the second.

Layer 1 finds tokens by content alone, as well as RoPE lets it. A query is made of `own` and `previous`, a
key of `previous` and `second`, in the slowest RoPE pairs: the key that follows the same two tokens matches,
and its token is the answer. The pairs turn by `d * theta`, so a match fades with the distance, is lost
among the others a little beyond `TRAINED_RANGE`, and is far beyond it as good as random. That is how models
fail past the positions that they were trained for, and why positions that stay small cure it.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 256
TRAINED_RANGE = 2048  # the longest context that full attention recalls from without a mistake
ROPE_THETA = 20000.0
HEAD_SIZE = 128
NUM_HEADS = 2  # query heads, each with a KV head of its own
NUM_LAYERS = 2
OFFSET_PAIRS = range(16)  # the fastest: one turn in 6 to 64 tokens
CONTENT_PAIRS = range(HEAD_SIZE // 2 - 16, HEAD_SIZE // 2)  # one turn in 10,000 to 100,000 tokens
CODE = 2 * len(CONTENT_PAIRS)  # entries of a code: the content pairs hold exactly one
HIDDEN = 3 * CODE
OWN, PREVIOUS, SECOND = (slice(start, start + CODE) for start in range(0, HIDDEN, CODE))
CONSTANT = 0  # the first entry of every code is 1
MOST_ALIKE = 12  # of CODE: the inner product of no two codes is larger
OFFSET_NATS = 20.0  # a pair's share of the logit at the sought distance
MATCH_NATS = 500.0  # the logit of two matching tokens nearby: all but a maximum
ANSWER_GAIN = 4.0  # the answer's code against the code of the token that asks


@dataclass(frozen=True)
class RetrievalPrompt:
    """A prompt that ends with a key, two tokens, and the token that must follow.

    `depth` is where the key stood, as a share of the prompt; its index is `position`.
    """

    tokens: list[int]
    key: tuple[int, int]
    answer: int
    position: int

    @property
    def depth(self) -> float:
        return self.position / len(self.tokens)


def write_constructed_model(folder: Path, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write config.json and model.safetensors, without a tokenizer: requests send token ids.

    Args:
        folder: made if missing.
        seed: of the codes.
        dtype: of the weights, a name that torch knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": TRAINED_RANGE,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {
        name: weight.to(getattr(torch, dtype)).contiguous()
        for name, weight in _weights(torch.Generator().manual_seed(seed)).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    embeddings = torch.zeros(VOCABULARY, HIDDEN)
    embeddings[:, OWN] = _codes(generator)
    # Told apart from the first token of a key, the second one's code is turned by a fixed rotation.
    turned = torch.linalg.qr(torch.randn(CODE, CODE, generator=generator)).Q
    weights = {"embed_tokens": embeddings, "norm": torch.ones(HIDDEN)}
    for layer, attention in enumerate((_find_by_offset(), _find_by_content(turned))):
        prefix = f"layers.{layer}"
        weights |= {f"{prefix}.self_attn.{name}": weight for name, weight in attention.items()}
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{prefix}.mlp.{name}"] = torch.zeros(HIDDEN, HIDDEN)
        weights[f"{prefix}.post_attention_layernorm"] = torch.ones(HIDDEN)
        # A third of an embedding's entries are filled, and all entries of what layer 0 makes of it:
        # with these both layers read codes of +1 and -1.
        filled = torch.full((HIDDEN,), (CODE / HIDDEN) ** 0.5 if layer == 0 else 1.0)
        weights[f"{prefix}.input_layernorm"] = filled
    return {f"model.{name}.weight": weight for name, weight in weights.items()}


def _codes(generator: torch.Generator) -> torch.Tensor:
    """Codes [VOCABULARY, CODE] of +1 and -1, drawn until none is too much like another."""
    codes = torch.empty(0, CODE)
    while len(codes) < VOCABULARY:
        code = 2.0 * torch.randint(2, (CODE,), generator=generator) - 1
        code[CONSTANT] = 1
        if not bool((codes @ code > MOST_ALIKE).any()):
            codes = torch.cat([codes, code[None]])
    return codes


def _projections() -> dict[str, torch.Tensor]:
    """Zeros: queries, keys and values [heads * head size, hidden], output [hidden, heads * head size]."""
    size = NUM_HEADS * HEAD_SIZE
    names = ("q_proj", "k_proj", "v_proj")
    return {name: torch.zeros(size, HIDDEN) for name in names} | {
        "o_proj": torch.zeros(HIDDEN, size)
    }


def _head(head: int) -> slice:
    return slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)


def _find_by_offset() -> dict[str, torch.Tensor]:
    """Layer 0: head `h` writes the code of the token `h + 1` before into its own part."""
    projections = _projections()
    pairs = torch.tensor(OFFSET_PAIRS)
    theta = ROPE_THETA ** (-2 * pairs / HEAD_SIZE)
    size = (OFFSET_NATS * HEAD_SIZE**0.5) ** 0.5
    for head, part in enumerate((PREVIOUS, SECOND)):
        query, key = torch.zeros(HEAD_SIZE), torch.zeros(HEAD_SIZE)
        offset = head + 1
        # The halves of a pair are half a head apart. A key is (1, 0), turned by its position; a query
        # is turned back by the offset first.
        query[pairs] = size * torch.cos(offset * theta)
        query[pairs + HEAD_SIZE // 2] = -size * torch.sin(offset * theta)
        key[pairs] = size
        projections["q_proj"][_head(head), CONSTANT] = query
        projections["k_proj"][_head(head), CONSTANT] = key
        projections["v_proj"][_head(head)][:CODE, OWN] = torch.eye(CODE)
        projections["o_proj"][part, _head(head)][:, :CODE] = torch.eye(CODE)
    return projections


def _find_by_content(turned: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer 1: every head adds the code of the token after the same two tokens to `own`."""
    projections = _projections()
    pairs = torch.tensor(CONTENT_PAIRS)
    rows = torch.cat([pairs, pairs + HEAD_SIZE // 2])
    # Two codes that match have an inner product of 2 * CODE.
    size = (MATCH_NATS * HEAD_SIZE**0.5 / (2 * CODE)) ** 0.5
    for head in range(NUM_HEADS):
        of_head = rows + head * HEAD_SIZE
        for name, last, one_before in (("q_proj", OWN, PREVIOUS), ("k_proj", PREVIOUS, SECOND)):
            projections[name][of_head, last] = size * torch.eye(CODE)
            projections[name][of_head, one_before] = size * turned
        projections["v_proj"][_head(head)][:CODE, OWN] = torch.eye(CODE)
        gain = ANSWER_GAIN / NUM_HEADS
        projections["o_proj"][OWN, _head(head)][:, :CODE] = gain * torch.eye(CODE)
    return projections


def retrieval_prompts(seed: int, length: int, num_keys: int = 1) -> list[RetrievalPrompt]:
    """Prompts of `length` tokens that differ in their last two tokens only, the key that they ask for.

    Random tokens, and in them keys of two tokens, each followed by its value, at random places. The two
    tokens of a key stand together nowhere else.

    Args:
        seed: the same seed makes the same prompts.
        length: tokens of each prompt, its question included.
        num_keys: keys in the text, and prompts.
    """
    rng = random.Random(f"{seed} {length} {num_keys}")
    size = length - 2
    while True:
        text = [rng.randrange(VOCABULARY) for _ in range(size)]
        positions = _places(rng, size, num_keys)
        keys = _unused_pairs(rng, text, num_keys)
        for position, key in zip(positions, keys, strict=True):
            text[position : position + 2] = key
        # A key may, beside its neighbors or before the question, have made another one.
        prompts = [
            RetrievalPrompt([*text, *key], key, text[position + 2], position)
            for position, key in zip(positions, keys, strict=True)
        ]
        if all(_count(prompt.tokens, prompt.key) == 2 for prompt in prompts):
            return prompts


def _places(rng: random.Random, size: int, count: int) -> list[int]:
    """Starts of keys in a text of `size` tokens, with room for a key and its value between them."""
    # Drawn as if each took one token instead of three, then moved apart.
    drawn = sorted(rng.sample(range(size - 2 * count), count))
    return [place + 2 * index for index, place in enumerate(drawn)]


def _unused_pairs(rng: random.Random, text: list[int], count: int) -> list[tuple[int, int]]:
    """Different pairs of tokens that do not stand together in the text."""
    used = set(pairwise(text))
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        pair = rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)
        if pair not in used:
            used.add(pair)
            pairs.append(pair)
    return pairs


def _count(tokens: list[int], pair: tuple[int, int]) -> int:
    return sum(both == pair for both in pairwise(tokens))


if __name__ == "__main__":
    print(write_constructed_model(Path(sys.argv[1])))
