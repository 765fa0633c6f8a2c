"""What vLLM has no public door for: one seam a file, each checked before it is used.

In every process:
    registration        makes TOKENSELECT a name that vLLM knows
    platform_backend    chooses which layers run on it
    model_length        lets a model read more than it was trained on, where positions are reassigned
    engine_config       checks the settings and puts the scheduler in place
    worker              installs the hooks of a worker before it makes a model

In a process that takes requests, or schedules them:
    request_validation  refuses a request whose own settings cannot be served
    scheduler           keeps query chunks whole, limits the prefix cache, says whom to preempt
    block_hashes        keeps what other settings computed apart in the prefix cache
    connector_loads     limits what comes from a KV connector; `lmcache_requests` what LMCache sees

In a worker:
    layer_backends      counts layers, and refuses a model that would not select; `dense_layers`
    chunked_local       leaves layers that attend within their own chunk on vLLM's own backend
    rotary_embedding    takes over the rotation of queries and keys, where positions are reassigned;
                        `rotary_probe`, `rotary_kinds`, `transformers_rope`
    runner_v1, _v2      give each request a stable seat, on both model runners
    metrics             publishes the counters once a worker is warm

`seam` is how all of them check and wrap vLLM's functions, `layers` asks them what a server would do with a
model, and `check` tries them on a release that is not installed.
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
        *scheduler_seams.CONNECTOR_SEAMS,
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
