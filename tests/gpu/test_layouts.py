"""Layers on TOKENSELECT and layers on vLLM's default backends find a layout of the KV cache in common."""

import importlib
import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import utils
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_tokenselect.backend import TokenSelectBackend

# vLLM's first choices, `_get_backend_priorities` of its CUDA platform.
DEFAULTS = {10: ["flashinfer", "flash_attn", "triton_attn"]}
OTHERS = ["flash_attn", "flashinfer", "triton_attn", "flex_attention"]
CLASSES = {
    "flashinfer": "FlashInferBackend",
    "flash_attn": "FlashAttentionBackend",
    "triton_attn": "TritonAttentionBackend",
    "flex_attention": "FlexAttentionBackend",
}
GPUS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]


class Absent(ModuleType):
    """A package that is not installed here, with every name that is imported from it."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class AbsentPackages:
    """Finds FlashInfer, which vLLM's backend imports and which needs a GPU."""

    def find_spec(self, name: str, path: object, target: object = None):
        if name.partition(".")[0] == "flashinfer":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def backend_class(name: str):
    finder = AbsentPackages()
    present = set(sys.modules)
    sys.meta_path.append(finder)  # behind those that find the installed one
    try:
        module = importlib.import_module(f"vllm.v1.attention.backends.{name}")
    finally:
        sys.meta_path.remove(finder)
        for added in set(sys.modules) - present:
            if added.partition(".")[0] == "flashinfer" and isinstance(sys.modules[added], Absent):
                del sys.modules[added]
    return getattr(module, CLASSES[name])


# Imported before any test says that this is a GPU.
BACKENDS = {name: backend_class(name) for name in CLASSES}


def on_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DeviceCapability(*capability)
    answers = {
        "is_cuda": lambda: True,
        "get_device_capability": lambda device_id=0: gpu,
        "has_device_capability": lambda least, device_id=0: gpu.to_int() >= least,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(current_platform, name, answer)


@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_each_default_backend_has_a_layout_in_common(capability, monkeypatch):
    on_gpu(capability, monkeypatch)
    for name in DEFAULTS.get(capability[0], OTHERS):
        backends = [TokenSelectBackend, BACKENDS[name]]
        assert utils.get_supported_kv_cache_layouts(backends), name


@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_a_model_on_tokenselect_alone_keeps_the_heads_of_a_token_together(capability, monkeypatch):
    on_gpu(capability, monkeypatch)
    assert utils.get_supported_kv_cache_layouts([TokenSelectBackend])[0] == KVCacheLayout.LBNHC


def test_hopper_takes_no_other_layout_than_what_is_read_in_place(monkeypatch):
    on_gpu((9, 0), monkeypatch)
    other = SimpleNamespace(supported_kv_cache_layouts=lambda: (KVCacheLayout.LBHNC,))
    with pytest.raises(ValueError, match="No KV cache layout satisfies"):
        utils.get_supported_kv_cache_layouts([TokenSelectBackend, other])
