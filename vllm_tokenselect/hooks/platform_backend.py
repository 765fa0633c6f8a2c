"""Let the platform choose TOKENSELECT for the layers that it can serve, and only for those.

Wraps `CpuPlatform.get_attn_backend_cls`, which ignores every backend but its own, and
`CudaPlatformBase.get_attn_backend_cls`, which refuses a whole model because of one sliding-window
layer. A layer that keeps vLLM's default backend is named in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_tokenselect.hooks.log import get_logger
from vllm_tokenselect.hooks.registration import BACKEND_NAME, BACKEND_PATH
from vllm_tokenselect.hooks.seam import Seam

_PARAMETERS = ("cls", "selected_backend", "attn_selector_config", "num_heads")
_WHY = "puts full-attention layers on TOKENSELECT and leaves the others on vLLM's own backend"

SEAMS = {
    "cpu": Seam(
        name="platform_backend",
        module="vllm.platforms.cpu",
        qualname="CpuPlatform.get_attn_backend_cls",
        parameters=_PARAMETERS,
        contains=("return AttentionBackendEnum.CPU_ATTN.get_path()",),
        why=_WHY,
    ),
    "cuda": Seam(
        name="platform_backend",
        module="vllm.platforms.cuda",
        qualname="CudaPlatformBase.get_attn_backend_cls",
        parameters=_PARAMETERS,
        contains=("if selected_backend is not None:", "validate_configuration("),
        why=_WHY,
    ),
}


def choose_backend(
    original: Callable[[Any, Any, int | None], str],
    selected: Any,
    layer: Any,
    num_heads: int | None,
) -> str:
    """Class path of the backend for one kind of layer.

    Args:
        original: the platform's own `get_attn_backend_cls`, bound.
        selected: the backend that the user chose, or None.
        layer: vLLM's `AttentionSelectorConfig`.
        num_heads: passed through.

    Raises:
        ValueError: for a model whose attention TOKENSELECT cannot serve.
    """
    if getattr(selected, "name", None) != BACKEND_NAME:
        return original(selected, layer, num_heads)
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionType

    logger = get_logger(__name__)
    if layer.use_mla or layer.use_sparse:
        raise ValueError(
            "TOKENSELECT cannot serve multi-head latent attention (MLA) or models with their own "
            "sparse attention: they cache no per-head keys to score. Leave out --attention-backend "
            "for this model."
        )
    kept = None
    if layer.attn_type != AttentionType.DECODER:
        kept = f"{layer.attn_type} attention"
    elif layer.has_sliding_window or layer.use_rswa:
        kept = "sliding-window attention"
    if kept is not None:
        path = original(None, layer, num_heads)
        logger.info_once("TOKENSELECT leaves layers with %s on %s.", kept, path.rsplit(".", 1)[-1])
        return path
    backend = selected.get_class()
    capability = current_platform.get_device_capability()  # None on a CPU
    reasons = backend.validate_configuration(device_capability=capability, **layer._asdict())
    if reasons:
        raise ValueError(
            f"TOKENSELECT cannot serve this model's attention layers: {', '.join(reasons)} "
            f"({layer!r}). Leave out --attention-backend for this model."
        )
    logger.info_once("Using TOKENSELECT for full-attention layers.")
    return BACKEND_PATH


def install(platform: type) -> None:
    """Wrap the platform class; safe to call again."""
    seam = SEAMS["cuda" if platform.device_type == "cuda" else "cpu"]  # type: ignore[attr-defined]
    if seam.require() == "patched" or "_tokenselect_get_attn_backend_cls" in vars(platform):
        return
    original = platform.get_attn_backend_cls  # type: ignore[attr-defined]

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        return choose_backend(original, selected_backend, attn_selector_config, num_heads)

    platform._tokenselect_get_attn_backend_cls = original  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)  # type: ignore[attr-defined]
