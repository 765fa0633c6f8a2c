"""A request's log-probabilities depend neither on kept kernels nor on what others left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models.zoo import save

pytestmark = pytest.mark.server


def serve(model: Path, kernels: Path) -> list[Any]:
    """Four lists of answers: selecting, with "off", and both again after a request of NaN each."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.answers", str(model)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(kernels)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(said) == 4, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"then kept in {kernels}" in done.stdout + done.stderr
    return said


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[list[Any], list[Any]]:
    """From an empty folder of kernels, and then from the same one."""
    folder = tmp_path_factory.mktemp("answers")
    options = {"num_hidden_layers": 3, "max_position_embeddings": 2048}
    model = save(folder / "model", "Llama", options)
    cold, warm = (serve(model, folder / "kernels") for _ in range(2))
    assert list((folder / "kernels").rglob("*.nbc"))
    return cold, warm


def test_kernels_out_of_the_cache_answer_as_those_that_were_just_compiled(served):
    cold, warm = served
    assert warm == cold
    assert cold[0] != cold[1], "selecting should matter"


@pytest.mark.parametrize("selects", [True, False], ids=["selecting", "off"])
def test_after_a_request_of_nan_all_others_are_answered_as_before(served, selects):
    before, after = served[0][0 if selects else 1], served[0][2 if selects else 3]
    assert after == before
