"""vLLM's guard on `--max-model-len` is lifted for reassigned positions, and only there."""

import json

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from tests.hooks.conftest import TINY_LLAMA
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks.model_length import check_trained_length
from vllm_tokenselect.method.settings import SettingsError

TRAINED = TINY_LLAMA["max_position_embeddings"]


@pytest.fixture
def arguments(tmp_path):
    def make(settings: dict | None, backend="TOKENSELECT", **options) -> EngineArgs:
        (tmp_path / "config.json").write_text(json.dumps({**TINY_LLAMA, **options}))
        return EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            max_model_len=4 * TRAINED,
            attention_backend=backend,
            additional_config={} if settings is None else {"tokenselect": settings},
        )

    return make


def test_reassigned_positions_reach_as_far_as_they_are_asked_to(arguments):
    config = arguments({"positions": "reassigned"}).create_model_config()
    assert config.max_model_len == 4 * TRAINED


@pytest.mark.parametrize(
    ("settings", "backend"),
    [(None, "TOKENSELECT"), ({"positions": "native"}, "TOKENSELECT"), ({"positions": "reassigned"}, None)],
    ids=["defaults", "native", "another backend"],
)  # fmt: skip
def test_all_others_keep_vllms_guard_also_after_one_that_did_not(arguments, settings, backend):
    arguments({"positions": "reassigned"}).create_model_config()
    with pytest.raises(ValueError, match="greater than the derived max_model_len"):
        arguments(settings, backend).create_model_config()


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"top_k": 5000}, "up to 6152 attended tokens .* Set top_k to at most 2944"),
        ({"n_local": 4000}, "Set smaller n_init, n_local, query_chunk and top_k"),
        ({"query_chunk": 16, "refresh_interval": 3000}, "Set top_k to at most 455"),
    ],
    ids=str,
)
def test_a_budget_beyond_the_trained_length_is_refused_with_what_fits(arguments, settings, advice):
    settings = {"positions": "reassigned", **settings}
    model_config = arguments(settings).create_model_config()
    with pytest.raises(SettingsError, match=advice):
        check_trained_length(model_config, TokenSelectConfig.from_mapping(settings))
    native = {**settings, "positions": "native"}
    check_trained_length(model_config, TokenSelectConfig.from_mapping(native))


def test_the_trained_length_counts_what_rope_scaling_adds(arguments):
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    settings = {"positions": "reassigned", "top_k": 5000}
    model_config = arguments(settings, rope_parameters=scaled).create_model_config()
    check_trained_length(model_config, TokenSelectConfig.from_mapping(settings))
