"""Two pipeline stages, each with layers of its own, say what one process says.

The stages are compiled: vLLM's CPU workers cannot run them eagerly.
"""

from dataclasses import asdict

import pytest

from tests.models.shortened import first_layers
from tests.oracle.cases import CACHED_SETTINGS
from tests.server.conftest import FP32, SMALL_WORKERS, serving

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    "positions", [pytest.param("native", marks=pytest.mark.endurance), "reassigned"]
)
def test_two_stages_say_what_one_process_says(smollm2, tokenizer, tmp_path, positions):
    from tests.oracle.prompts import prompt_tokens

    model = first_layers(smollm2, tmp_path / "model", 2)
    settings = {**asdict(CACHED_SETTINGS), "positions": positions}
    asked = [prompt_tokens(tokenizer, 1200 + i, 60 + 300 * i) for i in range(6)]
    said = []
    for stages in ("1", "2"):
        with serving(
            model,
            settings=settings,
            extra_args=(*FP32, "--pipeline-parallel-size", stages),
            env=SMALL_WORKERS,
            enforce_eager=stages == "1",
        ) as client:
            said.append([c.tokens for c in client.complete_all(asked, 24)])
    assert said[0] == said[1]
