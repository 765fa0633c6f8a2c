"""Install what a model has to find when a worker makes it, before the worker does.

Wraps `WorkerWrapperBase.init_device`, which every executor calls after loading plugins and before loading
the model. vLLM could retire this with a kind of plugin that is told the engine's configuration.
"""

from __future__ import annotations

import functools
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
)


def prepare_for_model(vllm_config: Any) -> None:
    """Install them, in a process that is to make a model on TOKENSELECT."""
    if is_selected(vllm_config.attention_config):
        chunked_local.install()
        layer_backends.install()


def install() -> None:
    """Wrap the method; safe to call again."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if SEAM.require() == "patched" or "_tokenselect_init_device" in vars(WorkerWrapperBase):
        return
    init_device = WorkerWrapperBase.init_device

    @functools.wraps(init_device)
    def prepare_and_init_device(self: Any) -> None:
        prepare_for_model(self.vllm_config)
        init_device(self)

    WorkerWrapperBase._tokenselect_init_device = init_device
    WorkerWrapperBase.init_device = prepare_and_init_device
