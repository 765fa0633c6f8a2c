"""The benchmarks for GPUs run, compare and draw; without a GPU, on what the interpreter can do."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.attention.__main__ import K, judge

SMALL = ("--contexts", "2048", "--batches", "1", "--prefill", "512", "--shapes", "Qwen2-7B")
SETTINGS = '{"top_k": 128, "n_init": 16, "n_local": 32, "query_chunk": 128}'


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_layer_is_measured_stage_by_stage_against_others_and_drawn(tmp_path):
    report = tmp_path / "report.json"
    run(
        *("benchmarks.attention", *SMALL, "--rounds", "1", "--cache-gib", "0.1"),
        *("--settings", SETTINGS, "--json", str(report), "--plots", str(tmp_path)),
    )
    results = json.loads(report.read_text())["results"]
    assert [result["step"] for result in results] == ["decode 1", "prefill 512"]
    for result in results:
        assert set(result["us"]) >= {"reselect", "score", "vote", "select", "attend"}
        assert "SDPA flash" in result["ratio_to"]
        assert "FA3" in result["unavailable"] or "FA3" in result["ratio_to"]
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "attention-speedup-qwen2-7b.png",
        "attention-stages-qwen2-7b.png",
    }


def test_bytes_and_operations_are_those_of_the_method(tmp_path):
    report = tmp_path / "report.json"
    run(
        *("benchmarks.attention", *SMALL, "--rounds", "1", "--cache-gib", "0.1"),
        *("--settings", SETTINGS, "--json", str(report), "--baselines"),
    )
    decode, _ = json.loads(report.read_text())["results"]
    key_bytes, heads_size = 4 * 128 * 2, 28 * 128
    candidates, attended = 2047 - 32 - 16, 16 + 128 + 32 + 1
    assert decode["bytes"]["score"] == candidates * key_bytes
    assert decode["bytes"]["attend"] == 2 * attended * key_bytes
    assert decode["bytes"]["full attention"] == 2 * 2048 * key_bytes
    assert decode["flops"]["reselect"] == (2 * candidates + 4 * attended) * heads_size
    assert decode["flops"]["full attention"] == 4 * 2048 * heads_size


def test_targets_are_met_or_lost_by_the_ratio_to_flash_attention():
    def result(ratio: float, share: float) -> dict:
        return {
            "shape": "Qwen2-7B",
            "step": "decode 8",
            "context": 128 * K,
            "ratio_to": {"FA3": {"reselect": ratio, "attend": 9.0}},
            "roofline_share": {"score": share},
        }

    verdicts = {name: met for name, *_, met in judge([result(1.4, 0.8)])}
    assert verdicts == {
        "decoding at 128K, batch 8, against FA3": False,
        "decoding at 128K, batch 8, selection reused, against FA3": True,
        "scores, share of the copy's bandwidth": True,
    }
