"""What cannot be served is refused at start; what is not TOKENSELECT's is left alone."""

import copy
import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform

from tests.hooks.conftest import TINY_LLAMA
from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.hooks.engine_config import configure, install
from vllm_tokenselect.hooks.registration import backend_member


@pytest.fixture
def vllm_config(make_vllm_config):
    return make_vllm_config()


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """vLLM's loggers do not hand their records on to the root."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm")
    return caplog


@pytest.fixture
def selected(vllm_config):
    vllm_config.attention_config.backend = backend_member()
    vllm_config.cache_config.user_specified_block_size = True
    return vllm_config


def test_when_not_selected_nothing_is_touched(vllm_config):
    vllm_config.additional_config = {"tokenselect": {"no such": "setting"}}
    vllm_config.speculative_config = SimpleNamespace()
    before = copy.deepcopy(vllm_config.scheduler_config)
    configure(vllm_config, "cpu")
    assert vllm_config.scheduler_config == before
    assert vllm_config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("async_scheduling", "chosen"),
    [(False, "TokenSelectScheduler"), (True, "TokenSelectAsyncScheduler")],
)
def test_our_scheduler_takes_the_place_of_the_one_vllm_would_choose(
    selected, async_scheduling, chosen
):
    selected.scheduler_config.async_scheduling = async_scheduling
    configure(selected, "cpu")
    scheduler = selected.scheduler_config.get_scheduler_cls()
    assert scheduler.__name__ == chosen
    bases = [base.__name__ for base in scheduler.__mro__]
    assert chosen.removeprefix("TokenSelect") in bases
    assert ("AsyncScheduler" in bases) == async_scheduling


def test_configuring_again_keeps_our_scheduler(selected):
    configure(selected, "cpu")
    chosen = selected.scheduler_config.scheduler_cls
    configure(selected, "cpu")
    assert selected.scheduler_config.scheduler_cls == chosen


def test_workers_may_have_as_many_numba_threads_as_there_are_cores(selected, monkeypatch):
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    configure(selected, "cpu")
    assert os.environ["NUMBA_NUM_THREADS"] == str(os.cpu_count())
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    configure(selected, "cpu")
    assert os.environ["NUMBA_NUM_THREADS"] == "1", "the user's own choice stands"


def test_a_foreign_scheduler_is_refused_by_name(selected):
    selected.scheduler_config.scheduler_cls = "their.Scheduler"
    with pytest.raises(SettingsError, match=r"--scheduler-cls their\.Scheduler cannot be used"):
        configure(selected, "cpu")


REFUSED = {
    "diffusion models": lambda config: setattr(config, "diffusion_config", SimpleNamespace()),
    "prefill that skips layers which share the cache of others (--kv-sharing-fast-prefill)": (
        lambda config: setattr(config.cache_config, "kv_sharing_fast_prefill", True)
    ),
    "decode context parallelism": lambda config: setattr(
        config.parallel_config, "decode_context_parallel_size", 2
    ),
    "prefill context parallelism": lambda config: setattr(
        config.parallel_config, "prefill_context_parallel_size", 2
    ),
}


@pytest.mark.parametrize("feature", REFUSED)
def test_an_engine_feature_that_is_not_served_is_refused_by_name(selected, feature):
    REFUSED[feature](selected)
    with pytest.raises(SettingsError, match=f"TOKENSELECT does not support {re.escape(feature)}"):
        configure(selected, "cpu")


def engine_config(folder: Path, **options) -> VllmConfig:
    """What vLLM makes of command-line options, with its checks in its own order."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    options |= {"attention_backend": "TOKENSELECT", "skip_tokenizer_init": True}
    return EngineArgs(model=str(folder), max_num_seqs=4, **options).create_engine_config()


def test_pipeline_stages_that_vllm_cannot_run_eagerly_on_cpus_are_refused(selected):
    selected.parallel_config.pipeline_parallel_size = 2
    selected.model_config.enforce_eager = True
    with pytest.raises(SettingsError, match=r"--enforce-eager on CPUs.*Leave it out"):
        configure(selected, "cpu")
    selected.model_config.enforce_eager = False
    configure(selected, "cpu")


@pytest.mark.parametrize("kind", ["pooling models", "encoder-decoder models"])
def test_a_kind_of_model_that_is_not_served_is_refused_by_name(selected, kind):
    selected.model_config = SimpleNamespace(
        runner_type="pooling" if kind == "pooling models" else "generate",
        is_encoder_decoder=kind == "encoder-decoder models",
        is_diffusion=False,
    )
    with pytest.raises(SettingsError, match=f"TOKENSELECT does not support {kind}"):
        configure(selected, "cpu")


def test_a_step_that_cannot_hold_a_chunk_beside_every_sequence_is_refused(selected):
    selected.scheduler_config.max_num_batched_tokens = 67
    with pytest.raises(SettingsError, match="at least 68"):
        configure(selected, "cpu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_num_scheduled_tokens": 67}, "max_num_scheduled_tokens=67 .*at least 68"),
        (
            {"enable_chunked_prefill": False, "max_num_scheduled_tokens": 68},
            "max_model_len=4096 .* Leave out --no-enable-chunked-prefill",
        ),
        ({"max_num_active_seqs": 5}, "max_num_seqs=5 .*at least 69"),
    ],
)
def test_an_option_that_makes_a_step_too_small_is_refused_by_name(selected, options, named):
    for name, value in options.items():
        setattr(selected.scheduler_config, name, value)
    with pytest.raises(SettingsError, match=named):
        configure(selected, "cpu")


def test_images_that_vllm_keeps_whole_are_refused_but_not_for_text(selected, monkeypatch):
    selected.scheduler_config.disable_chunked_mm_input = True
    configure(selected, "cpu")
    monkeypatch.setattr(type(selected.model_config), "supports_multimodal_inputs", True)
    with pytest.raises(SettingsError, match="--disable-chunked-mm-input.*--language-model-only"):
        configure(selected, "cpu")


def test_drafts_that_are_not_served_are_refused(selected):
    selected.speculative_config = SimpleNamespace(method="medusa")
    with pytest.raises(SettingsError, match="does not support the method 'medusa'"):
        configure(selected, "cpu")


def test_drafts_that_need_no_model_are_served_without_the_selection_cache(selected, caplog_vllm):
    selected.additional_config = {"theirs": 1, "tokenselect": {"query_chunk": 64, "top_k": 7}}
    given = copy.deepcopy(selected.additional_config)
    selected.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=0)
    configure(selected, "cpu")
    settings = {**given["tokenselect"], "similarity_threshold": 1.0}
    assert selected.additional_config == {"theirs": 1, "tokenselect": settings}
    read_by_workers = TokenSelectConfig.from_additional_config(selected.additional_config)
    assert not read_by_workers.method.reuses_selections
    assert "similarity_threshold 1" in caplog_vllm.text
    configure(selected, "cpu")
    assert selected.additional_config == {"theirs": 1, "tokenselect": settings}


def test_a_selection_cache_that_was_asked_for_is_refused_beside_drafts(selected):
    selected.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=0)
    selected.additional_config = {"tokenselect": {"similarity_threshold": 0.9}}
    with pytest.raises(
        SettingsError, match=r"similarity_threshold=0\.9 .*Set .* to 1 .*or leave out"
    ):
        configure(selected, "cpu")
    selected.additional_config = {"tokenselect": {"similarity_threshold": 1, "query_chunk": 64}}
    configure(selected, "cpu")


@pytest.fixture
def profile(tmp_path) -> Path:
    """A profile of the tiny model."""
    shape = {"layers": 1, "heads": 2, "kv_heads": 1, "head_size": 32, "hidden_size": 64}
    content = {
        "format": 1,
        "settings": {"top_k": 96, "query_chunk": 64, "similarity_threshold": 0.8},
        "model": {"name": "tiny", **shape},
        "lost": [],
        "versions": {},
        "date": "2026-11-29",
    }
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(content))
    return file


def test_the_settings_of_a_profile_take_its_place_so_that_workers_need_no_file(
    selected, profile, caplog_vllm
):
    own = {"profile": str(profile), "query_chunk": 32}
    selected.additional_config = {"theirs": 1, "tokenselect": own}
    configure(selected, "cpu")
    profile.unlink()
    settings = {"top_k": 96, "query_chunk": 32, "similarity_threshold": 0.8}
    assert selected.additional_config == {"theirs": 1, "tokenselect": settings}
    assert TokenSelectConfig.from_additional_config(selected.additional_config).top_k == 96
    assert f"serves by the profile {profile} for tiny" in caplog_vllm.text
    assert "given beside it: query_chunk" in caplog_vllm.text
    configure(selected, "cpu")
    assert selected.additional_config == {"theirs": 1, "tokenselect": settings}


def test_a_profile_of_another_model_stops_the_server(selected, profile):
    profile.write_text(profile.read_text().replace('"layers": 1', '"layers": 2'))
    selected.additional_config = {"tokenselect": {"profile": str(profile)}}
    with pytest.raises(SettingsError, match=r"is for tiny \(2 layers.*is served \(1 layers"):
        configure(selected, "cpu")


def test_without_a_profile_that_ships_the_defaults_serve_and_the_log_says_so(selected, caplog_vllm):
    selected.additional_config = {"tokenselect": {"profile": "auto", "query_chunk": 64}}
    configure(selected, "cpu")
    assert selected.additional_config == {"tokenselect": {"query_chunk": 64}}
    assert "serves by its defaults: no profile ships for" in caplog_vllm.text


def test_drafts_go_without_the_selection_cache_of_a_profile(selected, profile):
    selected.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=0)
    selected.additional_config = {"tokenselect": {"profile": str(profile)}}
    configure(selected, "cpu")
    settings = selected.additional_config["tokenselect"]
    assert settings["similarity_threshold"] == 1.0
    assert settings.source == f"the profile {profile} for tiny of 2026-11-29"


def test_settings_that_cannot_be_read_are_refused(selected):
    selected.additional_config = SimpleNamespace(compute_hash=lambda: "an object of the user's")
    with pytest.raises(SettingsError, match="additional_config must be a JSON object"):
        configure(selected, "cpu")


@pytest.mark.parametrize("others", [{}, {"gdn_prefill_backend": "triton", "ascend": {"top_p": 1}}])
def test_a_setting_in_the_wrong_place_stops_the_server_and_the_keys_of_others_do_not(
    selected, others
):
    right = {**others, "tokenselect": {"query_chunk": 64}}
    selected.additional_config = right
    configure(selected, "cpu")
    selected.additional_config = {**others, "query_chunk": 64}
    with pytest.raises(SettingsError) as refused:
        configure(selected, "cpu")
    assert f"--additional-config '{json.dumps(right)}'" in str(refused.value)


def test_without_drafts_the_settings_stay_as_they_were_given(selected):
    given = copy.deepcopy(selected.additional_config)
    configure(selected, "cpu")
    assert selected.additional_config == given


def test_a_setting_for_gpus_is_refused_on_a_cpu(selected):
    selected.additional_config = {"tokenselect": {"attention": "flash"}}
    with pytest.raises(SettingsError, match="attention='flash' is for GPUs"):
        configure(selected, "cpu")


@pytest.mark.parametrize(
    ("name", "device_type"), [("rocm", "cuda"), ("xpu", "xpu"), ("tpu", "tpu"), ("npu", "npu")]
)
def test_a_platform_without_kernels_is_refused_by_name(selected, name, device_type):
    class Platform(CpuPlatform):
        """Stands in for a platform of vLLM's, whose libraries are not here."""

    Platform.device_name, Platform.device_type = name, device_type
    install(Platform)
    with pytest.raises(SettingsError, match=f"no kernels for the platform '{name}'; it runs on"):
        Platform.check_and_update_config(selected)
    selected.attention_config.backend = None
    Platform.check_and_update_config(selected)


def test_the_installed_hook_adds_to_what_the_platform_does(selected):
    class Platform(CpuPlatform):
        """Wrapped in place of vLLM's, which other tests use."""

    install(Platform)
    selected.scheduler_config.async_scheduling = True
    Platform.check_and_update_config(selected)
    assert selected.scheduler_config.async_scheduling is False, "the platform's own part"
    assert selected.scheduler_config.scheduler_cls.endswith(".TokenSelectScheduler")
