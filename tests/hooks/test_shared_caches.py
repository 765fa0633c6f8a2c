"""A layer that reads the keys and values of an earlier one: which one that may be."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import set_current_vllm_config

from vllm_tokenselect.backend import TokenSelectBackend
from vllm_tokenselect.backend.cpu_impl import CpuTokenSelectImpl
from vllm_tokenselect.method.settings import SettingsError

WRITER = "model.layers.1.self_attn.attn"


class Unprepared(CpuTokenSelectImpl):
    """An implementation as vLLM makes it, which compiles and allocates nothing."""

    def prepare(self, vllm_config):
        pass


@pytest.fixture
def make_reader(make_vllm_config):
    """Makes a layer that reads what a layer like `writer` caches."""

    def make(writer: SimpleNamespace) -> Unprepared:
        vllm_config = make_vllm_config()
        vllm_config.compilation_config.static_forward_context[WRITER] = writer
        options = {"kv_cache_dtype": "auto", "kv_sharing_target_layer_name": WRITER}
        with set_current_vllm_config(vllm_config):
            return Unprepared(2, 32, 1.0, 1, **options)

    return make


def layer(impl: object, backend: object, kv_cache_dtype: str) -> SimpleNamespace:
    return SimpleNamespace(impl=impl, attn_backend=backend, kv_cache_dtype=kv_cache_dtype)


def test_a_layer_knows_the_one_whose_keys_it_reads(make_reader):
    selecting = layer(object.__new__(Unprepared), TokenSelectBackend, "auto")
    assert make_reader(selecting).writer is selecting


def test_a_layer_whose_keys_are_cached_in_another_way_is_refused_by_name(make_reader):
    windowed = layer(object(), SimpleNamespace(get_name=lambda: "CPU_ATTN"), "auto")
    with pytest.raises(SettingsError, match=r"reads the keys and values of .*layers\.1.* CPU_ATTN"):
        make_reader(windowed)
    quantized = layer(object.__new__(Unprepared), TokenSelectBackend, "fp8")
    with pytest.raises(SettingsError, match="--kv-cache-dtype fp8"):
        make_reader(quantized)
