"""Block hashes that tell by which settings a block's keys and values were computed.

Past the first layer, what a block of the prefix cache (or of an external KV store) holds depends on
which tokens were attended. So the fingerprint of the request's settings is hashed with its first
block, and by vLLM's chain with every block after it: requests and servers of different settings
share nothing.

Wraps `generate_block_hash_extra_keys` wherever it was imported, so that vLLM's KV cache events, which
name the extra keys for external routers, agree with the hashes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks.seam import Seam, replace_everywhere
from vllm_tokenselect.request_settings import fingerprint, requested_top_k

if TYPE_CHECKING:
    from vllm.v1.request import Request

_MODULE = "vllm.v1.core.kv_cache_utils"
_FUNCTION = "generate_block_hash_extra_keys"

SEAM = Seam(
    name="block_hashes",
    module=_MODULE,
    qualname=_FUNCTION,
    parameters=("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    contains=(
        "if (start_token_idx == 0 and request.cache_salt)",
        "return None, new_start_mm_idx",
        "return tuple(extra_keys), new_start_mm_idx",
    ),
    why="keeps what was computed by different settings apart in the prefix cache",
)

# vLLM hashes a request without saying for which engine; the last one of this process.
_config: TokenSelectConfig | None = None
_tensor_parallel_size = 1


def extra_keys(request: Request, start_token_idx: int) -> list[tuple[str, str]]:
    """What we add to the keys that are hashed with the block at `start_token_idx`.

    Tagged as vLLM tags its own.

    Raises:
        SettingsError: for settings that the API server should have refused. vLLM's engine then
            refuses the request.
    """
    if _config is None or start_token_idx > 0:
        return []
    extra_args = getattr(request.sampling_params, "extra_args", None)
    top_k = requested_top_k(extra_args, _config.top_k)
    return [("tokenselect", fingerprint(_config.method, top_k, _tensor_parallel_size))]


def use(config: TokenSelectConfig | None, tensor_parallel_size: int = 1) -> None:
    """Take the settings of the engine that this process runs; None if it is not on TOKENSELECT."""
    global _config, _tensor_parallel_size
    _config, _tensor_parallel_size = config, tensor_parallel_size


def install() -> None:
    """Wrap the function in every module that has it; safe to call again."""
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(original, "_tokenselect_original") or SEAM.require() == "patched":
        return

    @functools.wraps(original)
    def generate_with_settings(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        ours = extra_keys(request, start_token_idx)
        return ((*(keys or ()), *ours) if ours else keys), next_mm_idx

    generate_with_settings._tokenselect_original = original  # type: ignore[attr-defined]
    replace_everywhere(_FUNCTION, original, generate_with_settings)
