"""Prompts that another server computed, and that vLLM's NIXL connector reads from its memory.

vLLM hands over a prompt by request, not by what its blocks are named. So the server that computed a prompt
says with its answer, in `kv_transfer_params`, by which settings it did so and what the prompt was.

1. A request of other settings is refused (`request_validation`) before anything is read.
2. A request with another prompt, adapter, image or salt reads nothing, and computes its prompt.
3. A load ends at the request's limit, as with any connector. vLLM pairs the last block that it reads with
   the last one that the other server has, so the other server's blocks are cut there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.engine.connectors import HANDED_OVER
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.hooks.block_hashes import handed_over
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# Tokens past those that are already computed, and whether they are loaded between steps; None: ask later.
Match = tuple[int | None, bool]
Find = Callable[["Request", int], Match]

_ADDRESS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")


def check_layers(kv_cache_config: KVCacheConfig) -> None:
    """Refuse a model whose layers do not all keep all tokens, in blocks of one kind.

    Windows and states that a server hands over belong to the end of a prompt, where no load ends.

    Raises:
        SettingsError: naming the connector and the kinds of blocks.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
    if kinds != [FullAttentionSpec.__name__]:
        raise SettingsError(
            "the KV connector NixlConnector cannot be used with this model, whose layers keep blocks of "
            f"these kinds: {', '.join(kinds)}. It can where all layers keep all tokens (one kind, "
            f"{FullAttentionSpec.__name__}). Leave out --kv-transfer-config, or take OffloadingConnector."
        )


def say_what_was_computed(connector: Any) -> None:
    """Have a server that computes prompts for others say by which settings, and which prompt."""
    scheduler = connector.connector_scheduler
    finish = scheduler.request_finished

    def finish_and_say(request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        later, params = finish(request, block_ids)
        return later, params and {**params, HANDED_OVER: handed_over(request)}

    scheduler.request_finished = finish_and_say


def find_handed_over(find: Find, block_size: int) -> Find:
    """Have a reader ask for what it would have computed, and for no more.

    Args:
        find: what the connector finds, cut at the request's limit.
    """

    def find_same_prompt(request: Request, num_computed_tokens: int) -> Match:
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            # What a decoding server offers back was not computed in chunks.
            return 0, False
        if not _is_whole(params):
            # vLLM's worker would fail on it, and with it every request.
            params["do_remote_prefill"] = False
            return _compute(request, "do not say where its blocks are, and which")
        found, later = find(request, num_computed_tokens)
        if not found:
            return found, later
        (blocks,) = params["remote_block_ids"]
        num_blocks = (num_computed_tokens + found) // block_size
        if params.get(HANDED_OVER) != handed_over(request) or len(blocks) < num_blocks:
            return _compute(
                request,
                "offer what belongs to another one (its tokens, adapter, images, salt or settings differ)",
            )
        params["remote_block_ids"] = [blocks[:num_blocks]]
        return found, later

    return find_same_prompt


def _compute(request: Request, why: str) -> Match:
    get_logger(__name__).warning(
        "request %s computes its prompt: its kv_transfer_params %s", request.request_id, why
    )
    return 0, False


def _is_whole(params: dict[str, Any]) -> bool:
    """Whether parameters say where the blocks are, and which, as a server with one kind of block does."""
    groups = params.get("remote_block_ids")
    return all(params.get(name) is not None for name in _ADDRESS) and (
        isinstance(groups, list | tuple)
        and len(groups) == 1
        and isinstance(groups[0], list)
        and all(isinstance(block, int) for block in groups[0])
    )
