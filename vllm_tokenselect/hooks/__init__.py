"""What vLLM has no public door for: one seam a file, each checked before it is used.

registration        the name TOKENSELECT, in every process
platform_backend    which layers run on it
dense_layers        the first layers left on vLLM's own backend, where the settings say so
model_length        a longer --max-model-len than trained, where positions are reassigned
rotary_embedding    the rotation of queries and keys taken over from the model, likewise;
                    transformers_rope is its part for models in transformers' own code
engine_config       settings checked at start, the scheduler put in place;
                    graph_sizes is its part for CUDA graphs
request_validation  a request's own settings checked when it arrives
scheduler           whole query chunks, prefix-cache limits, whom to preempt
block_hashes        what other settings computed kept apart in the prefix cache
runner_v1, _v2      stable request slots on both model runners
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
        dense_layers,
        engine_config,
        metrics,
        model_length,
        platform_backend,
        registration,
        request_validation,
        rotary_embedding,
        runner_v1,
        runner_v2,
        scheduler_seams,
    )

    return (
        registration.SEAM,
        *platform_backend.SEAMS.values(),
        dense_layers.SEAM,
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
    )

    registration.install()
    model_length.install()
    platform = type(current_platform)
    platform_backend.install(platform)
    engine_config.install(platform)


def install_in_worker(model_runner_v2: bool) -> None:
    """Wrap the worker and its model runner, in a process that runs layers on TOKENSELECT."""
    from vllm.platforms import current_platform

    from vllm_tokenselect.hooks import metrics, runner_v1, runner_v2

    (runner_v2 if model_runner_v2 else runner_v1).install()
    metrics.install(current_platform.device_type)
