"""Hybrid models with default settings: every prompt ends, and says the same again and beside others."""

import json
import subprocess
import sys

import pytest

from tests.models.families import FAMILIES
from tests.models.zoo import save

pytestmark = [pytest.mark.server, pytest.mark.endurance]

BUDGETS = [300, 523, 640, 1000, 1170, 2048, 2500, 4096, 6001, 8192]
COUNT = 50  # prompts of each engine


def serve(folder, family: str, options: dict) -> list[dict]:
    model = save(folder / "model", *FAMILIES[family])
    command = [sys.executable, "-m", "tests.models.hybrid_load", str(model), json.dumps(options)]
    command += [json.dumps(BUDGETS), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    engines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    assert len(engines) == len(BUDGETS), done.stdout[-3000:] + done.stderr[-3000:]
    return engines


def test_500_prompts_with_gated_delta_nets_are_answered_alike_again_and_together(tmp_path):
    for engine in serve(tmp_path, "Qwen3-Next", {"dtype": "bfloat16"}):
        assert engine["block_size"] == 1152
        lengths = [length for length, _ in engine["said"]]
        assert engine["cached"] > 0.8 * sum(lengths)
        for length, (alone, again, together) in engine["said"]:
            assert again == alone, length
            # Beside others vLLM's kernel rounds otherwise, in bf16; texts may part later.
            assert together[0][0] == alone[0][0], length


def test_500_prompts_with_short_convolutions_end(tmp_path):
    """They say another thing again with vLLM's own backend as well: its convolutions on CPUs."""
    for engine in serve(tmp_path, "LFM2", {"dtype": "float32"}):
        assert engine["block_size"] == 128
        assert all(len(tokens) == 4 for _, said in engine["said"] for tokens, _ in said)
