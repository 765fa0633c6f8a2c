"""Install what a worker needs to run a model on TOKENSELECT, before it makes the model.

Wraps `WorkerWrapperBase.init_device`, which every executor calls after loading plugins and before loading
the model. It is the first function of a worker that knows the engine's configuration.
"""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks import (
    chunked_local,
    layer_backends,
    metrics,
    rotary_embedding,
    runner_v1,
    runner_v2,
)
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam

SEAM = Seam(
    name="worker",
    module="vllm.v1.worker.worker_base",
    qualname="WorkerWrapperBase.init_device",
    parameters=("self",),
    contains=("set_current_vllm_config(self.vllm_config)", "self.worker.init_device()"),
    why="installs the hooks of model and model runner before a worker makes them",
    retired_by="vLLM tells plugins an engine's configuration before a worker makes the model",
)


def prepare_for_model(vllm_config: Any) -> None:
    """Install the hooks of the model, its runner and its worker, in a process that is to make them.

    Does nothing for an engine that is not on TOKENSELECT.
    """
    if not is_selected(vllm_config.attention_config):
        return
    from vllm.platforms import current_platform

    chunked_local.install()
    layer_backends.install()
    (runner_v2 if vllm_config.use_v2_model_runner else runner_v1).install()
    metrics.install(current_platform.device_type)
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    if config.method.reassigns_positions:
        rotary_embedding.install()


def _prepare_and_init_device(init_device: Any, worker: Any) -> None:
    prepare_for_model(worker.vllm_config)
    init_device(worker)


def install() -> None:
    """Wrap the method; safe to call again."""
    SEAM.wrap(_prepare_and_init_device)
