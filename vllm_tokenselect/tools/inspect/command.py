"""`tokenselect inspect` and `tokenselect tune`: what selection does to a model, without a server."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.settings import Method, SettingsError
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.options import SUCH_AS, json_object
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.inspect.budgets import budget_costs, smallest_budget
from vllm_tokenselect.tools.inspect.layers import DIFFUSE_BELOW, compare_layers, diffuse_layers
from vllm_tokenselect.tools.inspect.model import DiagnosedModel
from vllm_tokenselect.tools.inspect.passages import built_in_passages, needle_passages, own_passages
from vllm_tokenselect.tools.inspect.tables import budget_table, draw_layers, layer_table


@dataclass(frozen=True)
class Subject:
    """The model and the settings to inspect.

    Attributes:
        model: folder or name of a model of transformers; None for SmolLM2-135M-Instruct.
        settings: tokenselect settings as JSON.
        device: of torch.
        length: tokens of the built-in passages.
        seed: of the built-in passages.
    """

    model: str | None
    settings: str
    device: str
    length: int
    seed: int

    @property
    def name(self) -> str:
        return self.model or str(ensure_smollm2())

    def method(self) -> Method:
        """The settings.

        Raises:
            ValueError: when they are no settings, or of reassigned positions.
        """
        given = json_object(self.settings, "--settings", SUCH_AS)
        method = TokenSelectConfig.from_mapping(given).method
        if method.reassigns_positions:
            raise SettingsError(
                'positions "reassigned" cannot be inspected: transformers hands over keys that are '
                "already rotated. Leave `positions` out."
            )
        return method

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name)
        tokenizer.model_max_length = 10**9  # no warning about long texts
        return tokenizer

    def described(self, method: Method) -> dict[str, Any]:
        """What the reader of a report must know of it."""
        return {"subject": asdict(self), "settings": asdict(method)}

    def load(self) -> DiagnosedModel:
        return DiagnosedModel(self.name, self.device, "float32" if self.device == "cpu" else "auto")


def run_inspect(
    subject: Subject,
    prompt: Path | None,
    console: Console,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Print the layers of a model over one prompt: the user's, or a number hidden in real text.

    Raises:
        ValueError: with a message for the user.
    """
    method, tokenizer = subject.method(), subject.tokenizer()
    if prompt is None:
        tokens = needle_passages(tokenizer, subject.length, 1, subject.seed)[0].tokens
    else:
        tokens = tokenizer(prompt.read_text())["input_ids"]
    layers = compare_layers(subject.load(), tokens, method)
    for kind in layers[0].mass:
        if layers[0].mass[kind]:
            console.print(layer_table(layers, kind))
    diffuse = diffuse_layers(layers)
    if diffuse:
        dense = json.dumps({"dense_layers": method.dense_layers + diffuse})
        console.print(
            f"The first {'layer keeps' if diffuse == 1 else f'{diffuse} layers keep'} less than "
            f"{DIFFUSE_BELOW:.0%} of the attention. To see what full attention there is worth, run "
            f"`tokenselect tune --settings '{dense}'`.",
            highlight=False,
            markup=False,
        )
    if plot is not None:
        draw_layers(layers, plot)
        console.print(f"Drawn into {plot}", highlight=False)
    found = {"tokens": len(tokens), "layers": [asdict(layer) for layer in layers]}
    write_json(json_path, subject.described(method) | found)


def run_tune(
    subject: Subject,
    prompts: list[Path],
    budgets: list[int],
    max_added: float,
    samples: int,
    count: int,
    console: Console,
    json_path: Path | None,
) -> int | None:
    """Print what each budget costs, and propose the smallest one that keeps the loss.

    Returns:
        the proposed `top_k`, or None when none of the budgets keeps it.

    Raises:
        ValueError: with a message for the user.
    """
    method, tokenizer = subject.method(), subject.tokenizer()
    passages = (
        own_passages(tokenizer, prompts, count)
        if prompts
        else built_in_passages(tokenizer, subject.length, samples, subject.seed)
    )
    longest = max(len(passage.tokens) for passage in passages)
    selecting = [k for k in sorted(budgets) if replace(method, top_k=k).attended_before < longest]
    if not selecting:
        raise SettingsError(
            f"budgets {sorted(budgets)} attend to all of {longest:,} tokens: give longer passages "
            "(--length) or smaller budgets."
        )
    kinds = len({passage.kind for passage in passages})
    costs = list(
        track(
            budget_costs(subject.load(), passages, method, selecting),
            description="budgets",
            total=len(selecting) * kinds,
            console=console,
        )
    )
    console.print(budget_table(costs))
    chosen = smallest_budget(costs, max_added)
    if chosen is None:
        console.print(
            f"None of these budgets adds at most {max_added} nats a token: give larger ones (--budget)."
        )
    else:
        settings = json.dumps({"tokenselect": {**json.loads(subject.settings), "top_k": chosen}})
        console.print(f"Smallest budget that adds at most {max_added} nats a token: {chosen}")
        console.print(f"  --additional-config '{settings}'", highlight=False, markup=False)
    found = {"max_added": max_added, "top_k": chosen, "costs": [asdict(cost) for cost in costs]}
    write_json(json_path, subject.described(method) | found)
    return chosen
