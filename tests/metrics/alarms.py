"""The alarms of `deploy/prometheus`, as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
RULES = REPOSITORY / "deploy/prometheus/tokenselect.rules.yaml"
ALARMS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
}
_SELECTOR = re.compile(r"vllm:\w+(?:\{[^}]*\})?")


def selectors(expression: str) -> list[str]:
    """The series that an expression reads, with the labels that it chooses by."""
    return _SELECTOR.findall(expression)


def metrics(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    return {selector.partition("{")[0] for selector in selectors(expression)}
