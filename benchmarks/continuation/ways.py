"""The ways of attending that continue a text, each served by vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_tokenselect.config import TokenSelectConfig

FULL, OFF, ALL, DEFAULT, SINK_LOCAL = "full", "off", "all", "default", "sink+local"


@dataclass(frozen=True)
class ServedWay:
    """A way to attend, served by vLLM.

    Attributes:
        settings: TokenSelect's; None for vLLM's own CPU attention.
        xargs: extra arguments of each request.
    """

    name: str
    settings: dict[str, Any] | None = None
    xargs: dict[str, Any] = field(default_factory=dict)


def served_ways(profiles: list[Path]) -> dict[str, ServedWay]:
    """Every way by its name; of each profile its settings, and its budget as sink and local window.

    `off` is full attention on TOKENSELECT: what rounding alone makes of a continuation.
    """
    every = {"min_context": 0}
    found = [
        ServedWay(FULL),
        ServedWay(OFF, {}, {"tokenselect": "off"}),
        ServedWay(ALL, every),
        ServedWay(DEFAULT, {}),
        ServedWay(SINK_LOCAL, unselected(every)),
    ]
    for file in profiles:
        settings = json.loads(file.read_text())["settings"]
        found.append(ServedWay(file.stem, settings))
        found.append(ServedWay(f"{file.stem} {SINK_LOCAL}", unselected(settings)))
    return {way.name: way for way in found}


def unselected(settings: dict[str, Any]) -> dict[str, Any]:
    """The same budget with nothing left to select but one token, the least that there is."""
    budget = TokenSelectConfig.from_mapping(settings)
    alone = {"anchor_layers": "all", "similarity_threshold": 1.0}
    return {**settings, **alone, "top_k": 1, "n_local": budget.n_local + budget.top_k - 1}
