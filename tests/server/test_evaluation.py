"""`tokenselect eval` against a real server: full attention and selection, side by side."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.server


def test_a_served_model_is_compared_with_itself_at_full_attention(sparse_client, smollm2, tmp_path):
    url, file = sparse_client.server.base_url, tmp_path / "eval.json"
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_tokenselect", "eval", url),
            *("--against", url, "--against-xargs", '{"tokenselect": "off"}'),
            *("--tasks", "passkey,vt,perplexity", "--lengths", "1400", "--samples", "2"),
            *("--texts", "1", "--steps", "4", "--depths", "2", "--json", str(file)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    written = json.loads(file.read_text())
    assert len(written["cells"]) == 2 * (2 + 2 + 1)
    attended = written["runs"][0]["attended"]["B"]
    assert 0 < attended["attended"] < attended["in_context"]
    losses = {cell["method"]: cell["losses"] for cell in written["cells"] if "losses" in cell}
    # Real text, read with and without its middle: not the same, and not far from each other.
    assert losses["A"] != losses["B"]
    assert losses["A"] == pytest.approx(losses["B"], abs=2.0)
    assert all(0 < loss < 20 for loss in losses["A"])
