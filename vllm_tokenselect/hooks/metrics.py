"""The counters in the server's `/metrics`, through prometheus_client's own doors.

One API server serves prometheus_client's registry of the process: a collector there adds up what the
workers wrote (`vllm_tokenselect.counters`). Several API servers, or the variable PROMETHEUS_MULTIPROC_DIR,
make `/metrics` add up prometheus_client's own files, with no regard to a registry: workers then write
such a file. vLLM's Rust frontend serves metrics of its own.

Wraps the worker's `compile_or_warm_up_model`, the last thing before it serves: what warmed it up does
not count, and a thread that reads from the device would break the capture of CUDA graphs.
"""

from __future__ import annotations

import functools
import importlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.values import MultiProcessValue

from vllm_tokenselect.counters import (
    COUNTERS,
    DIRECTORY_VARIABLE,
    ROW_KINDS,
    CounterFile,
    CounterPublisher,
    EngineLabels,
    make_shared_directory,
    read_counters,
    shared_directory,
    worker_counters,
)
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

_WHY = "starts to publish the counters when warm-up and graph capture are over"

SEAMS = {
    "cpu": Seam(
        name="metrics",
        module="vllm.v1.worker.cpu_worker",
        qualname="CPUWorker.compile_or_warm_up_model",
        parameters=("self",),
        why=_WHY,
    ),
    "cuda": Seam(
        name="metrics",
        module="vllm.v1.worker.gpu_worker",
        qualname="Worker.compile_or_warm_up_model",
        parameters=("self",),
        why=_WHY,
    ),
}

_PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# vLLM's own variable: names of more variables that Ray's workers are to get.
_RAY_VARIABLE = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@dataclass(frozen=True)
class _Metric:
    """One counter of `/metrics`, `name` with `_total`, and which of `COUNTERS` it shows."""

    name: str
    help: str
    counters: tuple[str, ...]
    labels: tuple[str, ...] = ("model_name", "engine", "tp_rank")

    def label_values(self, engine: EngineLabels, counter: str) -> tuple[str, ...]:
        return (engine.model_name, engine.engine, engine.tp_rank, counter)[: len(self.labels)]


_METRICS = (
    _Metric(
        "vllm:tokenselect_rows",
        "Rows of the sparse block tables, over all layers: reselected, reused from the Selection "
        "Cache, or dense, which attend to their whole context.",
        ROW_KINDS,
        ("model_name", "engine", "tp_rank", "kind"),
    ),
    _Metric(
        "vllm:tokenselect_tokens_attended",
        "Tokens attended to, summed over queries and layers.",
        ("attended",),
    ),
    _Metric(
        "vllm:tokenselect_tokens_in_context",
        "Tokens in the context, summed over queries and layers.",
        ("context",),
    ),
)


class TokenSelectCollector:
    """The metrics of one API server, read from the shared folder whenever they are collected."""

    def describe(self) -> Iterator[CounterMetricFamily]:
        """The metrics without values."""
        for metric in _METRICS:
            yield CounterMetricFamily(metric.name, metric.help, labels=metric.labels)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The metrics with a value for each engine that has counted, none before the first has."""
        directory = shared_directory()
        engines = read_counters(directory) if directory is not None else {}
        for metric, family in zip(_METRICS, self.describe(), strict=True):
            for engine, counts in engines.items():
                for counter in metric.counters:
                    family.add_metric(metric.label_values(engine, counter), counts[counter])
            yield family


_collector: TokenSelectCollector | None = None


def serve_counters() -> None:
    """Have the counters in `/metrics` of this process and those that it starts; safe to call again.

    To be called where TOKENSELECT is selected, before the engine is started: its processes inherit the
    names of the folders.

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
    if variable == _PROMETHEUS_VARIABLE:
        write = _prometheus_writer(engine)
    else:
        write = CounterFile(Path(directory), engine).write
    counters = worker_counters(device)
    counters.zero_()
    CounterPublisher(counters, write).start()


def install(device_type: str) -> None:
    """Wrap the device's worker class; safe to call again."""
    seam = SEAMS["cuda" if device_type == "cuda" else "cpu"]
    if seam.require() == "patched":
        return
    worker = getattr(importlib.import_module(seam.module), seam.qualname.split(".")[0])
    if "_tokenselect_compile_or_warm_up_model" in vars(worker):
        return
    original = worker.compile_or_warm_up_model

    @functools.wraps(original)
    def compile_or_warm_up_and_publish(self: Any) -> Any:
        result = original(self)
        start_publishing(self.vllm_config, self.device)
        return result

    worker._tokenselect_compile_or_warm_up_model = original
    worker.compile_or_warm_up_model = compile_or_warm_up_and_publish


def _prometheus_writer(engine: EngineLabels) -> Callable[[list[int]], None]:
    """Write to a file of prometheus_client, made now in the folder of PROMETHEUS_MULTIPROC_DIR.

    Not by its Counter: that decides when it is imported whether it writes to files, in a forked
    worker before the variable is set.
    """
    identity = f"tokenselect-{uuid.uuid4().hex}"
    value_class = MultiProcessValue(lambda: identity)  # type: ignore[no-untyped-call]
    values = {
        counter: value_class(
            "counter",
            metric.name,
            f"{metric.name}_total",
            metric.labels,
            metric.label_values(engine, counter),
            metric.help,
        )
        for metric in _METRICS
        for counter in metric.counters
    }

    def write(counts: list[int]) -> None:
        for counter, count in zip(COUNTERS, counts, strict=True):
            values[counter].set(count)

    return write
