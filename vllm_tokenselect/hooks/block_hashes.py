"""Block hashes that tell by which settings a block's keys and values were computed.

Past the first layer, what a block of the prefix cache (or of an external KV store) holds depends on
which tokens were attended. So the fingerprint of the request's settings is hashed with its first
block, and by vLLM's chain with every block after it: requests and servers of different settings
share nothing.

The queries of a chunk select together, so what its first block holds depends on the tokens of its last one.
Therefore a chunk is hashed as a whole with its first block. Without that, two prompts that part within a
chunk would share a name for different blocks.

What follows a request's limit depends on where its prompt ends. So a number of its own is hashed with
the blocks that end past the limit. Such blocks have names, since vLLM counts on one for each block, but
names that nobody else comes to: in the prefix cache, in an external KV store and in KV cache events alike.

Where a block is hashed with the tokens behind it too (vLLM 0.33, with EAGLE and MTP), the limit is compared
with the end of the block.

Wraps two functions:

- `EngineCore.preprocess_add_request`, which hands the engine's hasher to a request. The hasher is put into
  one that knows the engine's settings, and settings that no API server has checked are refused.
- `generate_block_hash_extra_keys`, wherever it was imported. vLLM's KV cache events, which name the extra
  keys for external routers, thus agree with the hashes.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.connectors import NO_STREAMS
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.request_settings import (
    fingerprint,
    requested_top_k,
    transfer_settings,
)
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    from vllm_tokenselect.method.settings import Method

_RETIRED_BY = "vLLM asks a scheduler what else to hash with a request's blocks"

SEAMS = (
    Seam(
        name="block_hashes",
        module="vllm.v1.core.kv_cache_utils",
        qualname="generate_block_hash_extra_keys",
        parameters=("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        contains=(
            "if (start_token_idx == 0 and request.cache_salt)",
            "return None, new_start_mm_idx",
            "return tuple(extra_keys), new_start_mm_idx",
        ),
        why="keeps what was computed by different settings apart in the prefix cache",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="block_hashes",
        module="vllm.v1.engine.core",
        qualname="EngineCore.preprocess_add_request",
        parameters=("self", "request"),
        contains=("Request.from_engine_core_request(request, self.request_block_hasher)",),
        why="tells a request's hasher the settings of its engine, and refuses what no front checked",
        retired_by=_RETIRED_BY,
    ),
)


@dataclass(frozen=True)
class SettingsHasher:
    """vLLM's hasher of one engine, and the settings of that engine.

    `lookahead` is the number of tokens behind a block that are hashed with it.
    """

    hasher: Callable[[Request], list[Any]]
    config: TokenSelectConfig
    tensor_parallel_size: int = 1
    block_size: int = 1
    lookahead: int = 0

    def __call__(self, request: Request) -> list[Any]:
        request._tokenselect_hasher = self
        return self.hasher(request)

    def key(self, request: Request) -> tuple[str, str]:
        """The key that is hashed with the request's first block, tagged as vLLM tags its own keys.

        Raises:
            SettingsError: for settings that the API server should have refused.
        """
        size = self.tensor_parallel_size
        return ("tokenselect", fingerprint(self.method, self.top_k(request), size, self.block_size))

    def top_k(self, request: Request) -> int:
        """Tokens that the request selects.

        Raises:
            SettingsError: see `key`.
        """
        extra_args = getattr(request.sampling_params, "extra_args", None)
        return requested_top_k(extra_args, self.config.top_k)

    @cached_property
    def method(self) -> Method:
        """With query chunks that line up with the blocks."""
        return self.config.method.for_blocks(self.block_size)


def shareable_tokens(request: Request, method: Method) -> int:
    """Tokens at the start of a request's prompt that others may share."""
    if hasattr(request, "_tokenselect_continued"):
        return 0
    return method.shareable_tokens(request.num_prompt_tokens)


def extra_keys(request: Request, start_token_idx: int, end_token_idx: int) -> list[tuple[str, str]]:
    """Our keys among those that are hashed with a block of these tokens, which end with its lookahead.

    Raises:
        SettingsError: see `SettingsHasher.key`.
    """
    hasher: SettingsHasher | None = getattr(request, "_tokenselect_hasher", None)
    if hasher is None:
        return []
    keys = [] if start_token_idx else [hasher.key(request)]
    chunk, limit = hasher.method.query_chunk, shareable_tokens(request, hasher.method)
    end, end_of_chunk = end_token_idx - hasher.lookahead, start_token_idx + chunk
    if start_token_idx % chunk == 0 and end < end_of_chunk <= limit:
        keys.append(
            ("tokenselect", _digest(request, start_token_idx, end_of_chunk, hasher.lookahead))
        )
    if end > limit:
        keys.append(("tokenselect", _own_number(request)))
    return keys


def handed_over(request: Request) -> dict[str, str]:
    """What another server has to know of a request to read its blocks: `settings`, and a digest `prompt`.

    The digest covers what may be shared of the prompt, with all that vLLM hashes beside its tokens. It is
    kept, since a scheduler asks again for as long as a request waits.
    """
    if not hasattr(request, "_tokenselect_handed_over"):
        request._tokenselect_handed_over = _describe(request)
    described: dict[str, str] = request._tokenselect_handed_over
    return described


def _describe(request: Request) -> dict[str, str]:
    hasher: SettingsHasher = request._tokenselect_hasher
    size, limit = hasher.tensor_parallel_size, shareable_tokens(request, hasher.method)
    return {
        "settings": transfer_settings(
            hasher.method, hasher.top_k(request), size, hasher.block_size
        ),
        "prompt": _digest(request, 0, limit, hasher.lookahead),
    }


def _digest(request: Request, start: int, end: int, lookahead: int) -> str:
    """What all of a chunk is: its tokens, and whatever else vLLM hashes with them."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    keys, _ = generate_block_hash_extra_keys(request, start, end + lookahead, 0)
    tokens = array("q", request.all_token_ids[start:end]).tobytes()
    return hashlib.sha256(tokens + repr(keys).encode()).hexdigest()


def _own_number(request: Request) -> str:
    """A number that no other request has, here or on another server, now or later."""
    if not hasattr(request, "_tokenselect_number"):
        request._tokenselect_number = secrets.token_hex(16)
    number: str = request._tokenselect_number
    return number


def check_and_bind(engine_core: EngineCore, request: EngineCoreRequest) -> None:
    """Check a request's settings, and have its blocks hashed by those of its engine.

    To be called before `EngineCore.preprocess_add_request`; what it raises ends this request alone.

    Raises:
        SettingsError: for settings that the API server should have refused.
    """
    vllm_config = engine_core.vllm_config
    if not is_selected(vllm_config.attention_config):
        return
    hasher = engine_core.request_block_hasher
    config = (
        hasher.config
        if isinstance(hasher, SettingsHasher)
        else TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    )
    requested_top_k(getattr(request.sampling_params, "extra_args", None), config.top_k)
    if request.resumable and vllm_config.kv_transfer_config is not None:
        raise SettingsError(NO_STREAMS)
    if hasher is not None and not isinstance(hasher, SettingsHasher):
        engine_core.request_block_hasher = SettingsHasher(
            hasher,
            config,
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.cache_config.block_size,
            getattr(vllm_config, "num_hash_lookahead_tokens", 0),
        )


def _generate_with_settings(
    generate: Any, request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
) -> tuple[tuple[Any, ...] | None, int]:
    keys, next_mm_idx = generate(request, start_token_idx, end_token_idx, start_mm_idx)
    ours = extra_keys(request, start_token_idx, end_token_idx)
    return ((*(keys or ()), *ours) if ours else keys), next_mm_idx


def _check_bind_and_preprocess(
    preprocess: Any, engine_core: EngineCore, request: EngineCoreRequest
) -> Any:
    check_and_bind(engine_core, request)
    return preprocess(engine_core, request)


def install() -> None:
    """Wrap both functions, one in every module that has it; safe to call again."""
    generate_keys, preprocess = SEAMS
    generate_keys.wrap(_generate_with_settings)
    preprocess.wrap(_check_bind_and_preprocess)
