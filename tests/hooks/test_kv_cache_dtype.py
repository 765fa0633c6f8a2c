"""A KV cache of another dtype than the model's is refused at start: its numbers would be read as others."""

from itertools import product
from typing import get_args

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.cache import CacheDType

from vllm_tokenselect.config import SettingsError
from vllm_tokenselect.engine.kv_cache import check_kv_cache_dtype
from vllm_tokenselect.hooks.engine_config import configure
from vllm_tokenselect.hooks.registration import backend_member

MODELS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = {"fp8", "fp8_e4m3", "fp8_e5m2"}


@pytest.mark.parametrize(("model", "device"), list(product(MODELS, ("cpu", "cuda"))))
def test_of_all_that_vllm_accepts_only_the_models_own_and_on_gpus_fp8_is_served(model, device):
    served = {"auto", model} | (FP8 if device == "cuda" else set())
    for cache_dtype in served:
        check_kv_cache_dtype(cache_dtype, MODELS[model], device)
    for cache_dtype in {*get_args(CacheDType), "float32"} - served:
        with pytest.raises(
            SettingsError, match=f"--kv-cache-dtype {cache_dtype} .* auto.* {model}"
        ):
            check_kv_cache_dtype(cache_dtype, MODELS[model], device)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16", "fp8", "int8_per_token_head"])
def test_an_engine_does_not_start(make_vllm_config, cache_dtype):
    vllm_config = make_vllm_config()  # of a model in float32
    vllm_config.attention_config.backend = backend_member()
    configure(vllm_config, "cpu")
    vllm_config.cache_config.cache_dtype = cache_dtype
    with pytest.raises(SettingsError, match=f"--kv-cache-dtype {cache_dtype} .* auto or float32"):
        configure(vllm_config, "cpu")
