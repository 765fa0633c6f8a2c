"""A request whose own settings cannot be served is refused when it arrives."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import input_processor

from vllm_tokenselect.hooks import request_validation
from vllm_tokenselect.hooks.engine_config import configure
from vllm_tokenselect.hooks.registration import backend_member
from vllm_tokenselect.method import Method

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}


@pytest.fixture(autouse=True)
def no_engine_yet(monkeypatch):
    monkeypatch.setattr(request_validation, "_engine", None)


@pytest.fixture
def vllm_config(make_vllm_config):
    """Of a server whose chunks select 2048 tokens."""
    config = make_vllm_config()
    config.attention_config.backend = backend_member()
    return config


@pytest.fixture(params=["hook", "diff"])
def send(request, vllm_config, monkeypatch):
    """Let vLLM's real input processor take a request, with the hook or with our diff."""

    class Platform(CpuPlatform):
        """Wrapped in place of vLLM's, which other tests use."""

    if request.param == "diff":
        name = "vllm/v1/engine/input_processor.py"
        module = request.getfixturevalue("load_patched")(name)
    else:
        module = input_processor
        request_validation.install(Platform)
        request_validation.install(Platform)
    monkeypatch.setattr(module, "current_platform", Platform())
    renderer = SimpleNamespace(
        _executor=None,
        tokenizer=None,
        get_eos_token_id=lambda: 0,
        validate_token_ids=lambda token_ids: None,
    )
    processor = module.InputProcessor(vllm_config, renderer)

    def process(**extra_args):
        params = SamplingParams(max_tokens=1, extra_args=extra_args or None)
        return processor.process_inputs("id", PROMPT, params, ("generate",))

    return process


BAD = {"tokenselect_top_k": 4096}


def test_a_value_that_cannot_be_served_is_refused_with_what_is_allowed(send, vllm_config):
    configure(vllm_config, "cpu")
    with pytest.raises(
        VLLMValidationError, match=r"tokenselect_top_k=4096 .* from 1 to this server's 2048"
    ):
        send(**BAD)


def test_what_can_be_served_reaches_the_engine_as_it_was_sent(send, vllm_config):
    configure(vllm_config, "cpu")
    for extra_args in ({}, {"tokenselect": "off"}, {"tokenselect_top_k": 2048, "other": 1}):
        assert send(**extra_args).sampling_params.extra_args == (extra_args or None)


def test_without_tokenselect_the_arguments_are_somebody_elses(send, vllm_config):
    assert send(**BAD).sampling_params.extra_args == BAD
    configure(vllm_config, "cpu")
    vllm_config.attention_config.backend = None
    configure(vllm_config, "cpu")
    assert send(**BAD).sampling_params.extra_args == BAD


def test_a_configuration_without_a_model_is_no_engine(vllm_config):
    configure(vllm_config, "cpu")
    configure(
        SimpleNamespace(attention_config=None, additional_config={}, model_config=None), "cpu"
    )
    with pytest.raises(VLLMValidationError):
        request_validation.validate(SamplingParams(extra_args=BAD))


def test_pooling_has_no_settings_of_ours(vllm_config):
    configure(vllm_config, "cpu")
    request_validation.validate(PoolingParams())


@pytest.fixture
def gpu_attention(monkeypatch):
    """Stands in for the module that knows the GPU's libraries; counts how often it is asked."""
    module = SimpleNamespace(asked=0, reason=None)

    def serves_full_attention(vllm_config):
        module.asked += 1
        return module.reason

    module.serves_full_attention = serves_full_attention
    monkeypatch.setitem(sys.modules, "vllm_tokenselect.backend.gpu_attention", module)
    return module


OFF = SamplingParams(extra_args={"tokenselect": "off"})


def test_off_is_refused_where_the_gpu_cannot_attend_to_everything(gpu_attention):
    gpu_attention.reason = "SDPA copies what it attends to"
    request_validation.use(request_validation.Engine(None, Method(), "cuda"))
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match='="off" cannot be served here: SDPA copies'):
            request_validation.validate(OFF)
    assert gpu_attention.asked == 1
    request_validation.validate(SamplingParams(extra_args={"tokenselect_top_k": 5}))


def test_off_is_served_elsewhere(gpu_attention):
    request_validation.use(request_validation.Engine(None, Method(), "cuda"))
    request_validation.validate(OFF)
    gpu_attention.reason = "not asked on a CPU"
    request_validation.use(request_validation.Engine(None, Method(), "cpu"))
    request_validation.validate(OFF)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_off_is_refused_where_positions_are_reassigned(device):
    method = Method(positions="reassigned")
    request_validation.use(request_validation.Engine(None, method, device))
    with pytest.raises(VLLMValidationError, match='="off" cannot be served .* are reassigned'):
        request_validation.validate(OFF)
