"""Leave layers that attend within their own chunk of the context on vLLM's default backend (Llama 4).

Such a layer asks for a backend as a full-attention layer does, and wraps the one it gets: each chunk
becomes a request of its own, which TOKENSELECT would take for a whole context. So it is given the backend
that vLLM would choose if the user had chosen none.

Wraps the `get_attn_backend` that vLLM's module of these layers has imported, once a worker starts
(`worker`).
"""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.hooks.platform_backend import default_backend
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam

SEAM = Seam(
    name="chunked_local",
    module="vllm.model_executor.layers.attention.chunked_local_attention",
    qualname="ChunkedLocalAttention.__init__",
    parameters=("self",),
    contains=(
        "underlying_attn_backend = get_attn_backend(head_size, dtype, kv_cache_dtype)",
        "create_chunked_local_attention_backend(underlying_attn_backend, attention_chunk_size)",
    ),
    calls="get_attn_backend",
    why="leaves layers that attend within a chunk on vLLM's own backend",
    retired_by="vLLM tells the platform that a layer is local when it asks for the layer's backend",
)


def choose_backend(head_size: int, dtype: Any, kv_cache_dtype: str) -> Any:
    """The backend that such a layer is to wrap."""
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    if is_selected(get_current_vllm_config().attention_config):
        return default_backend(head_size, dtype, kv_cache_dtype)
    return get_attn_backend(head_size, dtype, kv_cache_dtype)


def install() -> None:
    """Wrap the function in vLLM's module; safe to call again."""
    SEAM.wrap(lambda get_attn_backend, *kind: choose_backend(*kind))
