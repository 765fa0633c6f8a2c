"""What the oracle says to every case, kept in `expected*.json`: it takes minutes to compute.

    python -m tests.oracle.expected [expected_cached.json]    # computes all, or those named, anew

`test_expected.py` computes some of it again, so that a stale file does not pass.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.oracle.cases import (
    ANCHOR_SETTINGS,
    CACHED_SETTINGS,
    DENSE_LAYERS_ANCHOR_SETTINGS,
    DENSE_LAYERS_SETTINGS,
    REASSIGNED_SETTINGS,
    SETTINGS,
    Case,
    make_anchor_cases,
    make_cached_cases,
    make_cases,
    make_dense_layers_cases,
    make_reassigned_cases,
)
from tests.oracle.model import OracleModel, Selection

SETS: dict[Selection, tuple[str, Callable[[Any], list[Case]]]] = {
    SETTINGS: ("expected.json", make_cases),
    CACHED_SETTINGS: ("expected_cached.json", make_cached_cases),
    DENSE_LAYERS_SETTINGS: ("expected_dense_layers.json", make_dense_layers_cases),
    ANCHOR_SETTINGS: ("expected_anchors.json", make_anchor_cases),
    DENSE_LAYERS_ANCHOR_SETTINGS: ("expected_dense_layers_anchors.json", make_dense_layers_cases),
    REASSIGNED_SETTINGS: ("expected_reassigned.json", make_reassigned_cases),
}
# Where the oracle itself cannot tell two tokens apart, rounding may decide between them.
UNDECIDED_NATS = 1e-4
UNDECIDED_COSINE = 3e-5
LOGPROB_TOLERANCE = 1e-3
# Before their rotation the keys of one word are equal in the first layer, wherever it stands, but for the
# rounding of a matrix product, which then decides which of them are selected.
REASSIGNED_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Expected:
    """Greedy tokens, their log-probabilities, how far each was ahead of the second (nats).

    With a Selection Cache also the narrowest decision, as a cosine, that went before each.
    """

    prompt_sha256: str
    tokens: list[int]
    logprobs: list[float]
    leads: list[float]
    margins: list[float] | None = None


def file_of(settings: Selection) -> Path:
    return Path(__file__).with_name(SETS[settings][0])


def as_json(settings: Selection) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def sha256(prompt: list[int]) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def ask(oracle: OracleModel, case: Case) -> Expected:
    tokens, logprobs, leads, margins = oracle.generate(case.prompt, case.max_tokens)
    cached = oracle.settings.similarity_threshold < 1
    return Expected(sha256(case.prompt), tokens, logprobs, leads, margins if cached else None)


def load(cases: list[Case], settings: Selection = SETTINGS) -> dict[str, Expected]:
    """A file's content by name of the case; fails when it was made for other cases."""
    file = file_of(settings)
    content = json.loads(file.read_text())
    expected = {name: Expected(**values) for name, values in content["cases"].items()}
    stale = f"{file.name} is stale: run python -m tests.oracle.expected"
    assert content["settings"] == as_json(settings), stale
    assert {c.name: (sha256(c.prompt), c.max_tokens) for c in cases} == {
        name: (e.prompt_sha256, len(e.tokens)) for name, e in expected.items()
    }, stale
    return expected


def difference(
    tokens: list[int],
    logprobs: list[float],
    expected: Expected,
    tolerance: float = LOGPROB_TOLERANCE,
) -> tuple[str | None, bool]:
    """Compare what was generated with what the oracle says.

    Returns:
        what differs (None: nothing), and whether the comparison ended early, at something that the
        oracle leaves open: two tokens that are equally likely, or a selection that it reused, or did
        not reuse, by a hair's breadth.
    """
    if len(tokens) != len(expected.tokens):
        return f"{len(tokens)} tokens, the oracle's are {len(expected.tokens)}", False
    for position, (token, wanted) in enumerate(zip(tokens, expected.tokens, strict=True)):
        if expected.margins is not None and expected.margins[position] < UNDECIDED_COSINE:
            return None, True
        gap = logprobs[position] - expected.logprobs[position]
        if token != wanted:
            lead = expected.leads[position]
            if lead < (UNDECIDED_NATS if tolerance == LOGPROB_TOLERANCE else tolerance):
                return None, True  # what follows an undecided token is another text
            return (
                f"token {position} is {token}, the oracle's is {wanted}, ahead by {lead:.2e} nats; "
                f"log-probabilities {gap:+.2e} apart",
                False,
            )
        if abs(gap) > tolerance:
            return f"token {position} is {token} as expected, log-probability {gap:+.2e}", False
    return None, False


def main() -> None:
    from rich.progress import track
    from transformers import AutoTokenizer

    from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

    model = ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for settings, (file, make) in SETS.items():
        if sys.argv[1:] and file not in sys.argv[1:]:
            continue
        oracle = OracleModel(model, settings)
        asked = track(make(tokenizer), f"asking the oracle for {file}")
        answers = {case.name: _known(ask(oracle, case)) for case in asked}
        # One case a line: short enough to read, and a change shows where it is.
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(a)}" for name, a in answers.items())
        content = f'{{"settings": {json.dumps(as_json(settings))},\n "cases": {{\n{lines}\n}}}}\n'
        file_of(settings).write_text(content)


def _known(expected: Expected) -> dict[str, object]:
    return {name: value for name, value in asdict(expected).items() if value is not None}


if __name__ == "__main__":
    main()
