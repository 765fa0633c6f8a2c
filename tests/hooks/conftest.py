"""A real vLLM configuration of a tiny model, made-up releases of vLLM, and one with our diffs."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

BLOCK_SIZE = 16
QUERY_CHUNK = 64
TAIL_QUERIES = 10
MAX_NUM_SEQS = 4

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def environment():
    """Undo what vLLM's CPU platform writes into the environment of this process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def make_vllm_config(tmp_path_factory):
    """Build a real `VllmConfig` for the CPU, with query chunks of 64 and tails of 10."""
    pytest.importorskip("vllm")
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig

    model = tmp_path_factory.mktemp("tiny-llama")
    (model / "config.json").write_text(json.dumps(TINY_LLAMA))
    model_config = ModelConfig(
        model=str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=4096
    )

    def make(max_num_batched_tokens: int = QUERY_CHUNK + MAX_NUM_SEQS) -> VllmConfig:
        return VllmConfig(
            model_config=model_config,
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=4096,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
            ),
            device_config=DeviceConfig("cpu"),
            additional_config={
                "tokenselect": {"query_chunk": QUERY_CHUNK, "tail_queries": TAIL_QUERIES}
            },
        )

    return make


@pytest.fixture(scope="session")
def load_patched(tmp_path_factory):
    """Import a file of the installed vLLM with our diffs: `load_patched("vllm/platforms/cpu.py")`.

    The module lives beside vLLM's own, in the same package.
    """
    vllm = pytest.importorskip("vllm")
    from vllm_tokenselect.hooks.check.__main__ import REPOSITORY
    from vllm_tokenselect.hooks.check.release import check_release

    release = vllm.__version__.split("+")[0]
    diffs = sorted((REPOSITORY / "patches" / release).glob("*.patch"))
    tree = tmp_path_factory.mktemp("patched")
    report = check_release(Path(vllm.__file__).parents[1], diffs, tree)
    assert report.problems == []

    def load(name: str):
        package, _, stem = name.removesuffix(".py").replace("/", ".").rpartition(".")
        spec = importlib.util.spec_from_file_location(f"{package}.patched_{stem}", tree / name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for their module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def installed_vllm(tmp_path, monkeypatch):
    """Make up the vLLM that seams are checked against: `installed_vllm({"vllm/a.py": source})`."""
    from importlib.machinery import ModuleSpec

    def install(files: dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        spec = ModuleSpec("vllm", loader=None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / "vllm")]
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)

    return install
