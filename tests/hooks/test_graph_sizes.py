"""Which decoding steps vLLM captures as CUDA graphs."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode

from vllm_tokenselect.engine import graph_sizes
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.hooks import engine_config
from vllm_tokenselect.method.settings import Method, SettingsError

SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


@pytest.fixture
def config(make_vllm_config):
    config = make_vllm_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.cudagraph_capture_sizes = list(SIZES)
    config.compilation_config.max_cudagraph_capture_size = 512
    config.scheduler_config.max_num_seqs = 256
    return config


def limits(max_model_len: int, workspace_mb: int = 512) -> StepLimits:
    return StepLimits(Method(), 32, 8, max_model_len, workspace_mb << 20, full_attention=True)


def test_large_steps_of_a_server_of_eight_million_tokens_are_not_captured(config, caplog):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        graph_sizes.limit_captured_sizes(config, limits(1 << 23, workspace_mb=2048))
    sizes = config.compilation_config.cudagraph_capture_sizes
    assert max(sizes) == config.compilation_config.max_cudagraph_capture_size == 64
    assert sizes == [size for size in SIZES if size <= 64]
    assert "a group has 4 of them" in caplog.text
    assert graph_sizes.captured_steps(config) == sizes


def test_steps_with_drafts_that_do_not_fit_the_workspace_are_not_captured(config, caplog):
    logging.getLogger("vllm").propagate = True
    config.speculative_config = SimpleNamespace(num_speculative_tokens=3)
    with caplog.at_level(logging.WARNING):
        graph_sizes.limit_captured_sizes(config, limits(1 << 20))
    assert graph_sizes.captured_steps(config) == []
    assert "Set workspace_mb to at least 528, " in caplog.text
    config.compilation_config.cudagraph_capture_sizes = list(SIZES)
    graph_sizes.limit_captured_sizes(config, limits(1 << 20, workspace_mb=528))
    assert max(graph_sizes.captured_steps(config)) == 512


def test_a_row_that_a_graph_may_replay_takes_its_way_in_every_step(config):
    config.speculative_config = SimpleNamespace(num_speculative_tokens=3)
    assert graph_sizes.step_limits(config, 32, 8).graph_queries == 4


@pytest.mark.parametrize("max_model_len", [1 << 15, 1 << 20])
def test_what_is_captured_on_a_server_of_shorter_contexts_stays(config, max_model_len):
    graph_sizes.limit_captured_sizes(config, limits(max_model_len))
    assert config.compilation_config.cudagraph_capture_sizes == SIZES
    assert max(graph_sizes.captured_steps(config)) == 256, "no step has more tokens than requests"


def test_microbatches_are_refused_by_their_options(config):
    config.parallel_config.enable_dbo = True
    with pytest.raises(SettingsError, match="--enable-dbo, --ubatch-size"):
        engine_config.refuse_features(config, "cuda")
