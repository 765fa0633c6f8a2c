"""`tokenselect tune`: which layers may share selections, at which budget, and the profile that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vllm_tokenselect.method.settings import Method, SettingsError
from vllm_tokenselect.profiles import BESIDE, Lost, Profile, ProfileModel
from vllm_tokenselect.tools.common.files import write_json
from vllm_tokenselect.tools.common.provenance import now, versions
from vllm_tokenselect.tools.inspect.candidates import (
    Candidate,
    SettingsCost,
    choose,
    costs_of,
    make_candidates,
)
from vllm_tokenselect.tools.inspect.model import UnsupportedModel
from vllm_tokenselect.tools.inspect.passages import built_in_passages, own_passages
from vllm_tokenselect.tools.inspect.reading import Passage, read_in_full
from vllm_tokenselect.tools.inspect.sharing import SharedMass
from vllm_tokenselect.tools.inspect.subject import Subject
from vllm_tokenselect.tools.inspect.tables import anchor_table, cost_table, draw_matrix

# Settings that a profile names, whatever their defaults are.
_NAMED = ("top_k", "n_init", "n_local", "dense_layers", "anchor_layers", "min_context")


@dataclass(frozen=True)
class Search:
    """What to try.

    Attributes:
        budgets: values of `top_k`.
        dense_layers: values of the setting; none for what the settings say, or else 0 and 2.
        max_added: how much settings may add to the loss, nats a token.
        context: tokens of the context to be fast at.
        samples: number of built-in questions.
        count: tokens at the end of each of the user's prompts that the model predicts.
    """

    budgets: Sequence[int]
    dense_layers: Sequence[int]
    max_added: float
    context: int
    samples: int
    count: int


@dataclass(frozen=True)
class Files:
    """Where the results go; None for nowhere.

    Attributes:
        json: all of them.
        plot: the matrix as a picture.
        profile: the chosen settings.
    """

    json: Path | None
    plot: Path | None
    profile: Path | None


def run_tune(
    subject: Subject, prompts: list[Path], search: Search, files: Files, console: Console
) -> bool:
    """Print what sharing keeps and what settings lose, and propose the cheapest that keep the loss.

    Returns:
        whether any of them keeps it.

    Raises:
        ValueError: with a message for the user.
    """
    given, method = subject.given(), subject.method()
    dense = search.dense_layers or ((method.dense_layers,) if "dense_layers" in given else (0, 2))
    tried = [
        subject.method(top_k=top_k, dense_layers=layers)
        for layers in sorted(dense)
        for top_k in sorted(search.budgets)
    ]
    tokenizer = subject.tokenizer()
    passages = (
        own_passages(tokenizer, prompts, search.count)
        if prompts
        else built_in_passages(tokenizer, subject.length, search.samples, subject.seed)
    )
    methods = _that_select(tried, passages, console)
    model = subject.load()
    console.print("reading with full attention", style="dim")
    mass = SharedMass(replace(methods[0], min_context=0))
    full = read_in_full(model, passages, replace(methods[0], min_context=0), mass)
    if not mass.layers:
        raise UnsupportedModel(
            "No layer of this model selects: all have a sliding window, or are among the first "
            f"{methods[0].dense_layers} that the setting dense_layers leaves dense."
        )
    kept, worst = mass.matrix(), mass.worst()
    matrices = {"mean": kept, "worst tenth": worst}
    if files.plot is not None:
        draw_matrix(kept, mass.layers, files.plot)
        console.print(f"Drawn into {files.plot}", highlight=False)
    candidates = make_candidates(methods, mass.layers, matrices, search.context)
    console.print(anchor_table(candidates, mass.layers, matrices))
    kinds = len({passage.kind for passage in passages})
    costs = list(
        track(
            costs_of(model, passages, full, candidates),
            description="settings",
            total=len(candidates) * kinds,
            console=console,
        )
    )
    console.print(cost_table(costs, search.context))
    chosen = choose(costs, search.max_added)
    found = {
        "max_added": search.max_added,
        "context": search.context,
        "layers": mass.layers,
        "kept": kept.round(5).tolist(),
        "kept_by_worst_tenth": worst.round(5).tolist(),
        "costs": [asdict(cost) for cost in costs],
        "chosen": None if chosen is None else asdict(chosen),
    }
    write_json(files.json, subject.described(method) | found)
    if chosen is None:
        console.print(
            f"None of these settings adds at most {search.max_added} nats a token: give larger budgets "
            "(--budget) or more dense layers (--dense-layers)."
        )
        return False
    profile = _profile(given, chosen, costs, ProfileModel.of(subject.name, model.text_config))
    console.print(f"The cheapest settings that add at most {search.max_added} nats a token:")
    settings = json.dumps({"tokenselect": profile.settings})
    if files.profile is not None:
        files.profile.parent.mkdir(parents=True, exist_ok=True)
        files.profile.write_text(profile.as_json())
        settings = json.dumps({"tokenselect": {"profile": str(files.profile)}})
    console.print(f"  --additional-config '{settings}'", highlight=False, markup=False)
    return True


def _that_select(
    methods: Sequence[Method], passages: Sequence[Passage], console: Console
) -> list[Method]:
    """The settings with which generated tokens of the longest passage select."""
    longest = max(len(passage.tokens) for passage in passages)
    needed = {m: max(m.attended_before, m.min_context) for m in methods}
    selecting = [method for method in methods if needed[method] < longest]
    left_out = sorted({method.top_k for method in methods if method not in selecting})
    if not selecting:
        raise SettingsError(
            f"budgets {left_out} attend to all of {longest:,} tokens (with a min_context of up to "
            f"{max(m.min_context for m in methods):,}): give longer passages (--length) or smaller budgets."
        )
    if left_out:
        console.print(
            f"Left out: top_k {', '.join(map(str, left_out))}, with which the end of {longest:,} tokens "
            "attends to everything. Longer passages (--length) would tell them apart."
        )
    return selecting


def _profile(
    given: dict[str, Any], chosen: Candidate, costs: Sequence[SettingsCost], model: ProfileModel
) -> Profile:
    settings = {name: getattr(chosen.method, name) for name in _NAMED}
    if isinstance(settings["anchor_layers"], tuple):
        settings["anchor_layers"] = list(settings["anchor_layers"])
    lost = [
        Lost(
            kind=cost.kind,
            nats=round(cost.added, 5),
            low=None if cost.low is None else round(cost.low, 5),
            high=None if cost.high is None else round(cost.high, 5),
            prompts=cost.passages,
            prompt_tokens=cost.longest,
            tokens=cost.tokens,
        )
        for cost in costs
        if cost.candidate == chosen
    ]
    return Profile(
        settings={name: value for name, value in given.items() if name not in BESIDE} | settings,
        model=model,
        lost=lost,
        versions=versions(["vllm-tokenselect", "torch", "transformers"]),
        date=now().split("T")[0],
    )
