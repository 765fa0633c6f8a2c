"""What a worker installs before it makes a model; its layers then install nothing."""

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import chunked_local_attention
from vllm.model_executor.model_loader import base_loader, utils
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_tokenselect.backend.cpu_impl import CpuTokenSelectImpl
from vllm_tokenselect.hooks import worker
from vllm_tokenselect.hooks.registration import backend_member
from vllm_tokenselect.hooks.seam import is_wrapped

MODEL = {
    (chunked_local_attention, "get_attn_backend"),
    (utils, "initialize_model"),
    (CPUWorker, "compile_or_warm_up_model"),
}
RUNNER = {
    "0": {(RunnerV1, "_update_states"), (RunnerV1, "_build_attention_metadata")},
    "1": {(RunnerV2, name) for name in ("add_requests", "_remove_request")},
}
ROTATION = {(base_loader, "process_weights_after_loading")}
ALL = MODEL | RUNNER["0"] | RUNNER["1"] | ROTATION


@pytest.fixture
def installed(monkeypatch):
    """Functions that are wrapped when it is called; they are put back afterwards."""
    wrapped = [place for place in ALL if is_wrapped(*place)]
    for owner, name in ALL:
        function = getattr(owner, name)
        unwrapped = function.__wrapped__ if (owner, name) in wrapped else function
        monkeypatch.setattr(owner, name, unwrapped)
    return lambda: {place for place in ALL if is_wrapped(*place)}


@pytest.fixture
def config(make_vllm_config):
    config = make_vllm_config()
    config.attention_config.backend = backend_member()
    return config


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("positions", ["native", "reassigned"])
def test_a_worker_installs_what_its_model_and_runner_need(
    installed, config, runner, positions, monkeypatch
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    config.additional_config["tokenselect"] = {"positions": positions}
    for _ in range(2):
        worker.prepare_for_model(config)
        rotation = ROTATION if positions == "reassigned" else set()
        assert installed() == MODEL | RUNNER[runner] | rotation


def test_a_worker_of_another_engine_installs_nothing(installed, config):
    config.attention_config.backend = None
    worker.prepare_for_model(config)
    assert installed() == set()


def test_the_hooks_are_there_before_the_device_is_initialized(installed, config, monkeypatch):
    init_device = WorkerWrapperBase.init_device
    monkeypatch.setattr(
        WorkerWrapperBase, "init_device", getattr(init_device, "__wrapped__", init_device)
    )
    worker.install()
    found = []

    class Worker:
        def init_device(self):
            found.append(installed())

    wrapper = WorkerWrapperBase()
    wrapper.vllm_config, wrapper.worker = config, Worker()
    wrapper._worker_extension_cls = None
    wrapper.init_device()
    assert found
    assert found[0] >= MODEL


def test_a_layer_installs_nothing(installed, config):
    config.additional_config["tokenselect"] = {"positions": "reassigned"}
    with set_current_vllm_config(config), torch.device("meta"):
        layer = CpuTokenSelectImpl(2, 32, 1.0, 1)
    assert layer.reassigns_positions
    assert installed() == set()
