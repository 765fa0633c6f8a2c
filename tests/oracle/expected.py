"""What the oracle says to every case, kept in `expected.json`: it takes minutes to compute.

    python -m tests.oracle.expected     # computes it anew

`test_expected.py` computes some of it again, so that a stale file does not pass.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.oracle.cases import SETTINGS, Case, make_cases
from tests.oracle.model import OracleModel

FILE = Path(__file__).with_name("expected.json")
# Where the oracle itself cannot tell two tokens apart, rounding may decide between them.
UNDECIDED_NATS = 1e-4
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Expected:
    """Greedy tokens, their log-probabilities, and how far each was ahead of the second (nats)."""

    prompt_sha256: str
    tokens: list[int]
    logprobs: list[float]
    leads: list[float]


def sha256(prompt: list[int]) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def ask(oracle: OracleModel, case: Case) -> Expected:
    return Expected(sha256(case.prompt), *oracle.generate(case.prompt, case.max_tokens))


def load(cases: list[Case]) -> dict[str, Expected]:
    """The file's content by name of the case; fails when it was made for other cases."""
    content = json.loads(FILE.read_text())
    expected = {name: Expected(**values) for name, values in content["cases"].items()}
    stale = f"{FILE.name} is stale: run python -m tests.oracle.expected"
    assert content["settings"] == asdict(SETTINGS), stale
    assert {c.name: (sha256(c.prompt), c.max_tokens) for c in cases} == {
        name: (e.prompt_sha256, len(e.tokens)) for name, e in expected.items()
    }, stale
    return expected


def difference(
    tokens: list[int], logprobs: list[float], expected: Expected
) -> tuple[str | None, bool]:
    """Compare what was generated with what the oracle says.

    Returns:
        what differs (None: nothing), and whether an undecided token ended the comparison early.
    """
    if len(tokens) != len(expected.tokens):
        return f"{len(tokens)} tokens, the oracle's are {len(expected.tokens)}", False
    for position, (token, wanted) in enumerate(zip(tokens, expected.tokens, strict=True)):
        gap = logprobs[position] - expected.logprobs[position]
        if token != wanted:
            lead = expected.leads[position]
            if lead < UNDECIDED_NATS:
                return None, True  # what follows an undecided token is another text
            return (
                f"token {position} is {token}, the oracle's is {wanted}, ahead by {lead:.2e} nats; "
                f"log-probabilities {gap:+.2e} apart",
                False,
            )
        if abs(gap) > LOGPROB_TOLERANCE:
            return f"token {position} is {token} as expected, log-probability {gap:+.2e}", False
    return None, False


def main() -> None:
    from rich.progress import track
    from transformers import AutoTokenizer

    from vllm_tokenselect.cli.model import ensure_smollm2

    model = ensure_smollm2()
    cases = make_cases(AutoTokenizer.from_pretrained(model))
    oracle = OracleModel(model, SETTINGS)
    answers = {case.name: asdict(ask(oracle, case)) for case in track(cases, "asking the oracle")}
    # One case a line: short enough to read, and a change shows where it is.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(a)}" for name, a in answers.items())
    settings = json.dumps(asdict(SETTINGS))
    FILE.write_text(f'{{"settings": {settings},\n "cases": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
