"""What cannot be served stops the server at start, and what was not asked for changes nothing."""

import pytest

from tests.server.conftest import FP32, serving
from vllm_tokenselect.cli.server import ServerFailed, VllmServer

pytestmark = pytest.mark.server


def refusal(model, settings, *extra_args) -> str:
    with pytest.raises(ServerFailed):
        VllmServer(
            model,
            settings=settings,
            extra_args=extra_args,
            log_path=(log := model.parent / "refused.log"),
        ).start()
    return log.read_text()


def test_unknown_settings_stop_the_server_and_the_allowed_ones_are_listed(smollm2):
    log = refusal(smollm2, {"topk": 5, "n_local": -1})
    assert "topk: there is no such setting" in log
    assert "n_local = -1" in log
    assert "query_chunk: integer >= 1, default 512" in log


def test_a_step_too_small_for_a_chunk_stops_the_server_and_it_says_what_fits(smollm2):
    log = refusal(smollm2, {}, "--max-num-batched-tokens", "520", "--max-num-seqs", "16")
    assert "Set --max-num-batched-tokens to at least 528" in log


def test_not_chosen_the_package_changes_nothing(smollm2, prompts):
    with serving(smollm2, backend="CPU_ATTN", extra_args=FP32) as client:
        client.complete(prompts(300, 50), 2)
        log = client.server.log()
    assert "TokenSelectScheduler" not in log
    assert "Using TOKENSELECT" not in log
    assert "compiling the CPU kernels" not in log
