"""Which KV connectors an engine may have, and that their files tell settings apart."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from pydantic import ValidationError
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs

from tests.hooks.conftest import TINY_LLAMA
from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.engine.connectors import check_connectors
from vllm_tokenselect.hooks.engine_config import configure
from vllm_tokenselect.hooks.registration import backend_member

NIXL = ("NixlConnector", "NixlPullConnector")
SERVED = (
    "OffloadingConnector",
    "ExampleConnector",
    "MultiConnector",
    "LMCacheMPConnector",
    "NixlConnector",
)
WHOLE = {"block_size": 128, "enable_chunked_prefill": False, "max_num_batched_tokens": 4608}


@pytest.fixture
def engine(tmp_path):
    """What vLLM makes of command-line options, with its checks in its own order."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))

    def make(**options) -> VllmConfig:
        return EngineArgs(
            model=str(tmp_path),
            max_num_seqs=4,
            attention_backend="TOKENSELECT",
            skip_tokenizer_init=True,
            **options,
        ).create_engine_config()

    return make


def connector(name: str, **extra) -> KVTransferConfig:
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra)


@pytest.mark.parametrize("name", sorted({*KVConnectorFactory._registry} - {*SERVED, *NIXL}))
def test_a_connector_that_is_not_served_is_refused_with_the_reason(make_vllm_config, name):
    config = make_vllm_config()
    config.attention_config.backend = backend_member()
    config.kv_transfer_config = connector(name)
    with pytest.raises(SettingsError, match=f"does not serve the KV connector {name} ") as refusal:
        configure(config, "cuda")
    assert "nothing is known of it" not in str(refusal.value)
    assert all(served in str(refusal.value) for served in SERVED)
    config.kv_transfer_config = connector("MultiConnector", connectors=[{"kv_connector": name}])
    with pytest.raises(SettingsError, match=f"does not serve the KV connector {name} "):
        configure(config, "cuda")


def test_a_connector_that_is_not_vllms_is_refused(make_vllm_config):
    config = make_vllm_config()
    config.kv_transfer_config = connector("OffloadingConnector")
    config.kv_transfer_config.kv_connector_module_path = "theirs"
    with pytest.raises(SettingsError, match="it is not vLLM's own, so nothing is known of it"):
        check_connectors(config, TokenSelectConfig(), "cpu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kv_offloading_size": 1.0}, "CpuOffloadingSpec"),
        ({"kv_transfer_config": connector("OffloadingConnector")}, "CpuOffloadingSpec"),
        (
            {"kv_transfer_config": connector("ExampleConnector")},
            r"a step has to hold a whole one \(--no-enable-chunked-prefill\).*--block-size",
        ),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_with_what_to_do_instead(engine, options, named):
    with pytest.raises(ValidationError, match=named):
        engine(**options)


@pytest.mark.parametrize("installed", [False, True])
def test_lmcache_is_served_where_it_is_installed(make_vllm_config, monkeypatch, installed):
    spec = object() if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    named, sized = make_vllm_config(), make_vllm_config()
    named.kv_transfer_config = connector("LMCacheMPConnector")
    sized.cache_config.kv_offloading_size = 1.0
    sized.cache_config.kv_offloading_backend = "lmcache"
    for config in (named, sized):
        if installed:
            check_connectors(config, TokenSelectConfig(), "cpu")
        else:
            with pytest.raises(SettingsError, match=r"pip install lmcache==0\.5\.6"):
                check_connectors(config, TokenSelectConfig(), "cpu")


def test_lmcache_is_refused_with_what_was_not_tried(make_vllm_config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config, name = make_vllm_config(), "LMCacheMPConnector"

    def refused(match: str) -> None:
        with pytest.raises(SettingsError, match=f"{name} cannot be used with .*{match}"):
            check_connectors(config, TokenSelectConfig(), "cpu")

    config.kv_transfer_config = connector(name, **{"lmcache.mp.lazy_offload": True})
    refused("lazy_offload does")
    config.kv_transfer_config = connector("MultiConnector", connectors=[{"kv_connector": name}])
    refused("in a MultiConnector")
    config.kv_transfer_config = connector(name)
    monkeypatch.setenv("LMCACHE_USE_UPSTREAM_MP", "1")
    refused("GPUs only")


def test_beside_a_draft_model_only_the_offloading_is_served(make_vllm_config):
    config = make_vllm_config()
    for method in ("ngram", "eagle"):
        config.kv_transfer_config = connector("OffloadingConnector")
        config.speculative_config = SimpleNamespace(method=method)
        check_connectors(config, TokenSelectConfig(), "cuda")
    for name in NIXL:
        config.kv_transfer_config = connector(name)
        with pytest.raises(SettingsError, match=f"{name} cannot be used with eagle drafts"):
            check_connectors(config, TokenSelectConfig(), "cuda")


@pytest.mark.parametrize("name", NIXL)
def test_nixl_is_served_in_one_direction(make_vllm_config, name):
    config = make_vllm_config()
    config.kv_transfer_config = connector(name)
    check_connectors(config, TokenSelectConfig(), "cpu")
    config.kv_transfer_config = connector(name, bidirectional_kv_xfer=True)
    with pytest.raises(SettingsError, match=f"bidirectional_kv_xfer cannot be used with {name}"):
        check_connectors(config, TokenSelectConfig(), "cpu")


def test_an_offloading_size_is_served_on_a_gpu(make_vllm_config, monkeypatch):
    config = make_vllm_config()
    config.cache_config.kv_offloading_size = 1.0
    check_connectors(config, TokenSelectConfig(), "cuda")
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    with pytest.raises(SettingsError, match="unset VLLM_USE_SIMPLE_KV_OFFLOAD"):
        check_connectors(config, TokenSelectConfig(), "cuda")


def folder_of(engine, settings: dict, **options) -> str:
    """Where files of an engine with these settings are."""
    transfer = connector("ExampleConnector", shared_storage_path="/shared")
    config = engine(
        kv_transfer_config=transfer,
        additional_config={"tokenselect": settings},
        **(WHOLE | options),
    )
    return config.kv_transfer_config.kv_connector_extra_config["shared_storage_path"]


def test_files_of_different_settings_lie_in_different_folders(engine):
    different = [
        folder_of(engine, {}),
        folder_of(engine, {"top_k": 1024}),
        folder_of(engine, {"n_local": 256}),
        folder_of(engine, {}, block_size=64),
        folder_of(engine, {}, dtype="float32"),
    ]
    assert len(set(different)) == len(different)
    assert all(folder.startswith("/shared/tokenselect-") for folder in different)
    assert folder_of(engine, {"tail_queries": 32}) == different[0], "what is shared is the same"


def test_a_folder_is_given_once(engine, make_vllm_config):
    config = make_vllm_config()
    config.cache_config.user_specified_block_size = True
    config.scheduler_config.enable_chunked_prefill = False
    for name in ("ExampleConnector", "MultiConnector"):
        child = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
        extra = {"connectors": [child]} if name == "MultiConnector" else {}
        config.kv_transfer_config = connector(name, **extra)
        check_connectors(config, TokenSelectConfig(), "cpu")
        given = json.dumps(config.kv_transfer_config.kv_connector_extra_config)
        assert given.count("/tmp/tokenselect-") == 1
        check_connectors(config, TokenSelectConfig(), "cpu")
        assert json.dumps(config.kv_transfer_config.kv_connector_extra_config) == given
