"""`tokenselect bench` with real servers of a tiny random model: vLLM's attention and ours, in turn."""

import json
import os
import subprocess
import sys

import pytest

from tests.models.zoo import save

pytestmark = pytest.mark.server

SETTINGS = {"top_k": 128, "n_init": 16, "n_local": 64, "query_chunk": 128, "tail_queries": 16}
LENGTH, GENERATIONS, OUTPUT_TOKENS = 700, 2, 9


@pytest.fixture
def model(tokenizer, tmp_path):
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    folder = save(tmp_path / "tiny", "Llama", options)
    tokenizer.save_pretrained(folder)
    return folder


def test_both_are_started_measured_and_stopped(model, tmp_path):
    file = tmp_path / "bench.json"
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_tokenselect", "bench", "--model", str(model)),
            *("--baseline", "CPU_ATTN", "--settings", json.dumps(SETTINGS), "--json", str(file)),
            *("--lengths", str(LENGTH), "--rounds", "1", "--generations", str(GENERATIONS)),
            *("--output-tokens", str(OUTPUT_TOKENS), "--requests", "2", "--rates", "2"),
            *("--", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"),
        ],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(file.read_text())
    rows = {(row["rate"], row["contender"]): row for row in report["summary"]}
    assert list(rows) == [
        (rate, one) for rate in (None, 2.0) for one in ("CPU_ATTN", "TOKENSELECT")
    ]
    for row in rows.values():
        assert row["ttft_s"]["median"] > 0
        assert row["tpot_ms"]["median"] > 0
        assert row["worker_rss_mib"] > 100
        assert row["failed"] == 0
    assert {s["answer"]["output_tokens"] for s in report["samples"]} == {OUTPUT_TOKENS}
    assert rows[None, "CPU_ATTN"]["attended"] is None
    # At most 16 + 128 + 64 tokens and those of its own chunk, of up to 708.
    assert 0.1 < rows[None, "TOKENSELECT"]["attended"] < 0.8
    (selected,) = [s for s in report["selected"] if s["rate"] is None]
    assert 0.0 <= selected["reused"] <= 1.0
    of_two_layers = 2 * GENERATIONS * (OUTPUT_TOKENS - 1)
    assert selected["counts"]["reused"] == pytest.approx(selected["reused"] * of_two_layers)
    left = subprocess.run(["pgrep", "-f", f"serve {model}"], capture_output=True, text=True)
    assert left.stdout == ""
