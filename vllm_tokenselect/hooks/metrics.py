"""Has the workers' counters published, and the server show them in `/metrics`.

How they get there is in `vllm_tokenselect.metrics`. vLLM's Rust frontend serves metrics of its own, without
ours.

Wraps the worker's `compile_or_warm_up_model`, the last thing before it serves: what warmed it up does
not count, and a thread that reads from the device would break the capture of CUDA graphs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY

from vllm_tokenselect.counters import worker_counters
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.metrics import (
    DIRECTORY_VARIABLE,
    CounterFile,
    CounterPublisher,
    EngineLabels,
    TokenSelectCollector,
    make_shared_directory,
)

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

_WHY = "starts to publish the counters when warm-up and graph capture are over"
_RETIRED_BY = "vLLM lets an attention backend add counters to the statistics of a worker"

SEAMS = {
    "cpu": Seam(
        name="metrics",
        module="vllm.v1.worker.cpu_worker",
        qualname="CPUWorker.compile_or_warm_up_model",
        parameters=("self",),
        why=_WHY,
        retired_by=_RETIRED_BY,
    ),
    "cuda": Seam(
        name="metrics",
        module="vllm.v1.worker.gpu_worker",
        qualname="Worker.compile_or_warm_up_model",
        parameters=("self",),
        why=_WHY,
        retired_by=_RETIRED_BY,
    ),
}

_PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# vLLM's own: the names of more variables for Ray's workers.
_RAY_VARIABLE = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


_collector: TokenSelectCollector | None = None


def serve_counters() -> None:
    """Have the counters in `/metrics` of this process and those that it starts; safe to call again.

    Call it where TOKENSELECT is selected, before the engine is started: the engine's processes inherit
    the names of the folders.

    Raises:
        SettingsError: when the folder that TOKENSELECT_METRICS_DIR names cannot be made.
    """
    global _collector
    try:
        make_shared_directory()
    except OSError as error:
        raise SettingsError(
            f"{DIRECTORY_VARIABLE} names a folder that cannot be made: {error}. Name another, or "
            "unset it for a temporary one."
        ) from error
    copied = [name.strip() for name in os.environ.get(_RAY_VARIABLE, "").split(",")]
    copied += [DIRECTORY_VARIABLE, _PROMETHEUS_VARIABLE]
    os.environ[_RAY_VARIABLE] = ",".join(filter(None, dict.fromkeys(copied)))
    if _collector is None:
        _collector = TokenSelectCollector()
        REGISTRY.register(_collector)


_asked_to_publish = False


def start_publishing(vllm_config: VllmConfig, device: torch.device) -> None:
    """Start to publish what this worker counts from now on; later calls do nothing.

    Not before CUDA graphs are captured.
    """
    global _asked_to_publish
    if _asked_to_publish or not is_selected(vllm_config.attention_config):
        return
    _asked_to_publish = True
    variable = _PROMETHEUS_VARIABLE if _PROMETHEUS_VARIABLE in os.environ else DIRECTORY_VARIABLE
    directory = os.environ.get(variable)
    if not directory or not Path(directory).is_dir():
        get_logger(__name__).warning(
            "TOKENSELECT: this worker's counters will be missing in /metrics: %s is %s here. Before "
            "the server is started, set it to a folder that all of its machines share.",
            variable,
            directory or "not set",
        )
        return
    parallel = vllm_config.parallel_config
    engine = EngineLabels(
        model_name=str(vllm_config.model_config.served_model_name),
        engine=str(parallel.data_parallel_index),
        tp_rank=str(parallel.rank % parallel.tensor_parallel_size),
    )
    counters = worker_counters(device)
    counters.zero_()
    CounterPublisher(counters, CounterFile(Path(directory), engine).write).start()


def _warm_up_and_publish(compile_or_warm_up_model: Any, worker: Any) -> Any:
    result = compile_or_warm_up_model(worker)
    start_publishing(worker.vllm_config, worker.device)
    return result


def install(device_type: str) -> None:
    """Wrap the device's worker class; safe to call again."""
    SEAMS["cuda" if device_type == "cuda" else "cpu"].wrap(_warm_up_and_publish)
