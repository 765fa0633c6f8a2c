"""Let the platform choose TOKENSELECT for the layers that it can serve, and only for those.

Wraps `CpuPlatform.get_attn_backend_cls`, which ignores every backend but its own, and
`CudaPlatformBase.get_attn_backend_cls`, which refuses a whole model because of one sliding-window
layer. `layer_backends` logs which layers run on which backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_tokenselect.engine.refusals import refuse_model
from vllm_tokenselect.hooks.registration import BACKEND_NAME, BACKEND_PATH
from vllm_tokenselect.hooks.seam import Seam

_PARAMETERS = ("cls", "selected_backend", "attn_selector_config", "num_heads")
_WHY = "puts full-attention layers on TOKENSELECT and leaves the others on vLLM's own backend"
_RETIRED_BY = (
    "vLLM asks a registered backend which layers it takes, and keeps the others on its own"
)

SEAMS = {
    "cpu": Seam(
        name="platform_backend",
        module="vllm.platforms.cpu",
        qualname="CpuPlatform.get_attn_backend_cls",
        parameters=_PARAMETERS,
        contains=("return AttentionBackendEnum.CPU_ATTN.get_path()",),
        why=_WHY,
        retired_by=_RETIRED_BY,
    ),
    "cuda": Seam(
        name="platform_backend",
        module="vllm.platforms.cuda",
        qualname="CudaPlatformBase.get_attn_backend_cls",
        parameters=_PARAMETERS,
        contains=("if selected_backend is not None:", "validate_configuration("),
        why=_WHY,
        retired_by=_RETIRED_BY,
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
        layer: the kind of layer, vLLM's `AttentionSelectorConfig`.
        num_heads: of the layer; handed on to `original`.

    Raises:
        SettingsError: for a model whose attention TOKENSELECT cannot serve.
    """
    if getattr(selected, "name", None) != BACKEND_NAME:
        return original(selected, layer, num_heads)
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionType

    if layer.use_mla:
        refuse_model("multi-head latent attention (MLA) caches no per-head keys to score")
    if layer.use_sparse:
        refuse_model("its layers have a sparse attention of their own")
    if layer.attn_type != AttentionType.DECODER or layer.has_sliding_window or layer.use_rswa:
        return original(None, layer, num_heads)
    backend = selected.get_class()
    capability = current_platform.get_device_capability()  # None on a CPU
    reasons = backend.validate_configuration(device_capability=capability, **layer._asdict())
    if reasons:
        refuse_model(*(_in_words(reason, layer, backend, capability) for reason in reasons))
    return BACKEND_PATH


def default_backend(head_size: int, dtype: Any, kv_cache_dtype: str, **kind: Any) -> Any:
    """The backend that vLLM would choose for a layer if the user had chosen none."""
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    config = get_current_vllm_config().attention_config
    chosen = config.backend, config.backend_per_kind
    config.backend, config.backend_per_kind = None, {}
    try:
        return get_attn_backend(head_size, dtype, kv_cache_dtype, **kind)
    finally:
        config.backend, config.backend_per_kind = chosen


def _in_words(reason: str, layer: Any, backend: Any, capability: Any) -> str:
    """A reason of vLLM's `validate_configuration` with the value that it is about and what is allowed."""
    sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.supported_dtypes)
    words = {
        "head_size not supported": f"its head size is {layer.head_size}, which is none of {sizes}",
        "dtype not supported": f"its dtype is {layer.dtype}, which is none of {dtypes}",
        "kv_cache_dtype not supported": f"--kv-cache-dtype {layer.kv_cache_dtype} is none of "
        + ", ".join(backend.supported_kv_cache_dtypes),
        "block_size not supported": f"--block-size {layer.block_size} is not a multiple of 16",
        "partial multimodal token full attention not supported": "its images are attended in both "
        "directions (--language-model-only serves its text alone)",
        "per-head quant scales not supported": "its KV cache is quantized with a scale for each head",
        "compute capability not supported": f"this GPU has compute capability {capability}, and 8.0 or "
        "newer is needed",
        "non-causal attention not supported": "its attention is not causal",
        "batch invariance not supported": "VLLM_BATCH_INVARIANT is set",
    }
    return words.get(reason, reason)


def _choose_first(
    get_attn_backend_cls: Any,
    cls: type,
    selected_backend: Any,
    attn_selector_config: Any,
    num_heads: int | None = None,
) -> str:
    original = functools.partial(get_attn_backend_cls, cls)
    return choose_backend(original, selected_backend, attn_selector_config, num_heads)


def install(platform: type) -> None:
    """Wrap the platform class; safe to call again."""
    seam = SEAMS["cuda" if platform.device_type == "cuda" else "cpu"]  # type: ignore[attr-defined]
    seam.wrap(_choose_first, platform)
