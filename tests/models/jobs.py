"""What is asked of models: one process, `tests.models.serve`, answers for all that the tests chose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

# A model, and in which way it is served or what else is asked of it.
Job = tuple[str, dict[str, Any]]
Answers = Callable[[str, dict[str, Any]], Any]


def parametrized(names: Iterable[str], every_run: set[str]) -> list[Any]:
    """Those that every test run asks, and with `make endurance` the others: a minute is enough."""
    marks = pytest.mark.endurance
    return [name if name in every_run else pytest.param(name, marks=marks) for name in names]


def chosen_names(request: pytest.FixtureRequest) -> set[str]:
    """The names that the chosen tests of the file are about."""
    return {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }


def ask(jobs: Sequence[Job], paths: Sequence[Path], file: Path) -> Answers:
    """What each model says, or the error that stopped it.

    Args:
        jobs: what is asked.
        paths: for each job, the folder of its model.
        file: where the questions are written to.
    """
    asked = [(str(path), way) for path, (_, way) in zip(paths, jobs, strict=True)]
    file.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tests.models.serve", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    said = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]
    assert len(said) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    return lambda name, way: said[jobs.index((name, way))]


def assert_same(said: Any, expected: Any) -> None:
    assert "error" not in said, said
    assert "error" not in expected, expected
    for (tokens, logprob), (wanted, wanted_logprob) in zip(said, expected, strict=True):
        assert tokens == wanted
        assert logprob == pytest.approx(wanted_logprob, abs=2e-3)
