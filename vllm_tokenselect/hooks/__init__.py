"""What vLLM has no public door for: one seam a file, each checked before it is used.

registration        the name TOKENSELECT, in every process
platform_backend    which layers run on it
worker              what a model has to find when a worker makes it, installed before
layer_backends      layers counted: a model that would not select is refused before it is loaded;
                    dense_layers is its part that leaves the first layers on vLLM's own backend
chunked_local       layers that attend within their own chunk left on vLLM's own backend
model_length        a longer --max-model-len than trained, where positions are reassigned
rotary_embedding    the rotation of queries and keys taken over from the model, likewise;
                    transformers_rope is its part for models in transformers' own code
engine_config       settings checked at start, the scheduler put in place;
                    graph_sizes is its part for CUDA graphs
request_validation  a request's own settings checked when it arrives
scheduler           whole query chunks, prefix-cache limits, whom to preempt
block_hashes        what other settings computed kept apart in the prefix cache
runner_v1, _v2      stable request seats on both model runners
metrics             what is counted, in /metrics once a worker is warm
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_tokenselect.hooks.seam import Finding, Seam, SeamBroken

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Finding", "Seam", "SeamBroken", "all_seams", "check_installed_hooks"]


def all_seams() -> Sequence[Seam]:
    """Every seam of the project. Needs vLLM's dependencies, not vLLM itself."""
    from vllm_tokenselect.hooks import (
        block_hashes,
        chunked_local,
        engine_config,
        layer_backends,
        metrics,
        model_length,
        platform_backend,
        registration,
        request_validation,
        rotary_embedding,
        runner_v1,
        runner_v2,
        scheduler_seams,
        worker,
    )

    return (
        registration.SEAM,
        *platform_backend.SEAMS.values(),
        worker.SEAM,
        layer_backends.SEAM,
        chunked_local.SEAM,
        model_length.SEAM,
        *engine_config.SEAMS.values(),
        *request_validation.SEAMS,
        *scheduler_seams.SEAMS,
        *block_hashes.SEAMS,
        rotary_embedding.SEAM,
        *runner_v1.SEAMS,
        *runner_v2.SEAMS,
        *metrics.SEAMS.values(),
    )


def check_installed_hooks() -> list[Finding]:
    """Check every seam against the installed vLLM, for `tokenselect doctor`."""
    return [seam.check_installed() for seam in all_seams()]


def install_in_every_process() -> None:
    """Register the backend and wrap the platform: what a process needs before it is configured."""
    from vllm.platforms import current_platform

    from vllm_tokenselect.hooks import (
        engine_config,
        model_length,
        platform_backend,
        registration,
        worker,
    )

    registration.install()
    model_length.install()
    platform = type(current_platform)
    platform_backend.install(platform)
    engine_config.install(platform)
    worker.install()


def install_in_worker(model_runner_v2: bool) -> None:
    """Wrap the worker and its model runner, in a process that runs layers on TOKENSELECT."""
    from vllm.platforms import current_platform

    from vllm_tokenselect.hooks import metrics, runner_v1, runner_v2

    (runner_v2 if model_runner_v2 else runner_v1).install()
    metrics.install(current_platform.device_type)
