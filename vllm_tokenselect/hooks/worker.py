"""Install what a model has to find when a worker makes it, before the worker does.

Wraps `WorkerWrapperBase.init_device`, which every executor calls after loading plugins and before loading
the model. vLLM could retire this with a kind of plugin that is told the engine's configuration.
"""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.hooks import chunked_local, layer_backends
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam

SEAM = Seam(
    name="worker",
    module="vllm.v1.worker.worker_base",
    qualname="WorkerWrapperBase.init_device",
    parameters=("self",),
    contains=("set_current_vllm_config(self.vllm_config)", "self.worker.init_device()"),
    why="installs the hooks that a model has to find when it is made",
    retired_by="vLLM tells plugins an engine's configuration before a worker makes the model",
)


def prepare_for_model(vllm_config: Any) -> None:
    """Install them, in a process that is to make a model on TOKENSELECT."""
    if is_selected(vllm_config.attention_config):
        chunked_local.install()
        layer_backends.install()


def _prepare_and_init_device(init_device: Any, worker: Any) -> None:
    prepare_for_model(worker.vllm_config)
    init_device(worker)


def install() -> None:
    """Wrap the method; safe to call again."""
    SEAM.wrap(_prepare_and_init_device)
