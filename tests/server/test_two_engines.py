"""Engines that one process talks to keep to their own settings, whichever of them was made last.

Each computes in a process of its own: vLLM 0.32 for CPUs cannot start a second one in a process that has
loaded numba, as the first one has. What they would share there, the tests of `hooks` hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.shortened import first_layers
from tests.server.conftest import SMALL_WORKERS

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def answers(smollm2, tmp_path_factory) -> dict[str, dict[str, list[float] | str]]:
    """What an engine with top_k 256 answers after one on CPU_ATTN was made, and what that one does."""
    folder = tmp_path_factory.mktemp("engines")
    model = first_layers(smollm2, folder / "shortened", 2)
    environment = os.environ | SMALL_WORKERS
    environment |= {"VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    out = folder / "answers.json"
    command = [sys.executable, "-m", "tests.server.engines", str(model), str(out)]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return json.loads(out.read_text())


def test_engines_of_one_process_take_and_refuse_by_their_own_settings(answers):
    sparse, full = answers["256"], answers["CPU_ATTN"]
    assert "tokenselect_top_k=99999 cannot be used" in sparse["too many"]
    assert "this server's 256" in sparse["too many"]
    assert sparse["again"] == pytest.approx(sparse["default"], abs=1e-4), "the engine still answers"
    assert sparse["off"] == pytest.approx(full["default"], abs=1e-3)
    assert sparse["default"] != pytest.approx(sparse["few"], abs=1e-3), "they are to be told apart"
    for name, answer in full.items():
        assert answer == pytest.approx(full["default"], abs=1e-3), f"{name} is somebody else's"


def test_the_example_without_a_server_answers_by_the_settings_of_each_request(answers):
    assert all(answers["example"].values()), "two layers of a model say something, if nothing wise"
    assert answers["example"]["default"] != answers["example"]["off"]
