"""A vLLM that lacks something which we use is found out before anybody installs it."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm

from vllm_tokenselect.hooks.check.names import check_names
from vllm_tokenselect.hooks.check.start import rehearse

INSTALLED = Path(vllm.__file__).parents[1]
RELEASE = vllm.__version__.split("+")[0]


@pytest.fixture
def change(tmp_path):
    """Change a copy of the installed release: `change("vllm/envs.py", old, new)`; returns its folder."""
    shutil.copytree(
        INSTALLED / "vllm",
        tmp_path / "source" / "vllm",
        copy_function=lambda path, copy: Path(copy).symlink_to(path),
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )

    def replace(name: str, old: str, new: str) -> Path:
        path = tmp_path / "source" / name
        source = path.read_text()
        assert old in source, f"{name} has no {old!r}"
        path.unlink()  # a link to the installed file
        path.write_text(source.replace(old, new))
        return tmp_path / "source"

    return replace


def test_what_a_release_moved_renamed_or_removed_is_named(change):
    change("vllm/v1/kv_cache_interface.py", "def is_quantized_kv_cache", "def is_quantized")
    change("vllm/_custom_ops.py", "def cpu_attn_get_scheduler_metadata(\n    num_reqs", "def "
           "cpu_attn_get_scheduler_metadata(\n    num_requests")  # fmt: skip
    change("vllm/config/model.py", "def get_num_attention_heads(", "def get_num_heads(")
    change("vllm/config/scheduler.py", "max_num_batched_tokens", "max_num_tokens_of_a_step")
    source = change("vllm/v1/attention/backend.py", "fast_build: bool", "fast: bool")
    problems = "\n".join(check_names(source))
    for told in (
        "Could not import `is_quantized_kv_cache` from `vllm.v1.kv_cache_interface`",
        "Unexpected keyword argument `num_reqs` in function `vllm._custom_ops.cpu_attn_get_scheduler",
        "Object of class `ModelConfig` has no attribute `get_num_attention_heads`",
        "Object of class `SchedulerConfig` has no attribute `max_num_batched_tokens`",
        "Class member `CpuTokenSelectMetadataBuilder.build` overrides parent class",
    ):
        assert told in problems


def test_a_release_on_which_a_server_cannot_start_is_told(change, tmp_path):
    change("vllm/v1/attention/backends/cpu_attn.py", "_get_attn_isa", "_find_attn_isa")
    source = change("vllm/v1/worker/gpu_model_runner.py", "def _update_states(", "def _update(")
    problems = "\n".join(rehearse(source, RELEASE, "cpu", tmp_path / "staged"))
    missing = (
        "ImportError: cannot import name '_get_attn_isa' from 'vllm.v1.attention.backends.cpu_attn'"
    )
    for told in (
        f"vllm_tokenselect.backend.cpu_attention cannot be imported: {missing}",
        f"an engine cannot be configured: {missing}",
        "the hooks for model runner V1 cannot be installed: SeamBroken",
    ):
        assert f"on cpu: {told}" in problems
    assert "V2" not in problems
