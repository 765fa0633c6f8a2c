"""LMCache is shown of a request what may be shared, under a name that carries the settings.

LMCache cuts a prompt into chunks and names each by all tokens up to its end, and by a salt of the request.
It keeps a tracker for each request: its tokens, its salt, and how many tokens were found and stored.

1. The salt says by which settings the request is computed, and all that vLLM hashes beside the tokens: an
   adapter, the request's own salt, images. So requests and servers of other settings share nothing.
2. The tokens end at the request's limit. So nothing past it is looked up, loaded or stored.
3. LMCache's chunks hold whole query chunks. Otherwise two prompts that part within a query chunk would
   share a name for different blocks.
4. Of a load that failed LMCache reports all blocks of its chunks, also those at their start that were in
   the prefix cache and that it left alone. Other requests may be reading these, so they are not lost.

After a load that failed LMCache goes on counting as computed what it did not load. It stores nothing too
early all the same, since it stores no more than has blocks, and a request gets blocks for no more than the
tokens of the step, unless a draft model asks for more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_tokenselect.engine.connectors import number_formats
from vllm_tokenselect.engine.lmcache import LMCACHE
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from vllm_tokenselect.hooks.block_hashes import SettingsHasher

_INTEGRATION = "lmcache.integration.vllm"
_RETIRED_BY = "LMCache asks an engine what else to name a request's chunks by, and where they end"

SEAMS = (
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.lmcache_mp_connector",
        qualname="LMCacheMPConnector._get_or_create_request_tracker",
        parameters=("self", "request"),
        contains=(
            "new_tracker = LMCacheMPRequestTracker(request)",
            "return self.request_trackers[request_id]",
        ),
        why="shows LMCache what may be shared of a request, under the name of its settings",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.lmcache_mp_connector",
        qualname="LMCacheMPConnector.get_num_new_matched_tokens",
        parameters=("self", "request", "num_computed_tokens"),
        contains=(
            "tracker = self._get_or_create_request_tracker(request)",
            "token_ids=tracker.get_token_ids(), cache_salt=tracker.cache_salt",
            "tracker.num_lmcache_hit_tokens = ret",
        ),
        why="looks up no more than the tracker's tokens",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.lmcache_mp_metadata",
        qualname="LMCacheMPRequestTracker.get_token_ids",
        parameters=("self",),
        contains=(
            "return list(self.all_token_ids)",
            "return self.mm_adjusted_prompt_ids + list(self.all_token_ids[num_prompt_tokens:])",
        ),
        why="names chunks by the tracker's tokens",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.lmcache_mp_metadata",
        qualname="LMCacheMPRequestMetadata.GetStoreMetadata",
        parameters=("tracker", "lmcache_tokens_per_chunk"),
        contains=(
            "min_available_tokens = min(len(tracker.all_token_ids), allocated_tokens, computed_tokens,",
            "num_chunks = num_staging_tokens // lmcache_tokens_per_chunk",
            "token_ids = tracker.get_token_ids()",
            "cache_salt=tracker.cache_salt",
        ),
        why="stores whole chunks of the tracker's tokens",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.lmcache_mp_metadata",
        qualname="LMCacheMPRequestMetadata.GetRetrieveMetadata",
        parameters=("tracker", "lmcache_tokens_per_chunk"),
        contains=(
            "end_token_idx = tracker.num_lmcache_hit_tokens",
            "token_ids = tracker.get_token_ids()",
            "cache_salt=tracker.cache_salt",
        ),
        why="loads what was found of the tracker's tokens",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.vllm_multi_process_adapter",
        qualname="LMCacheMPWorkerAdapter.submit_retrieve_request",
        parameters=("self", "request_id", "op"),
        contains=(
            "self.error_block_ids.update(op.flat_block_ids)",
            "self.retrieve_futures[request_id] = (future, op.flat_block_ids)",
        ),
        why="takes no block for lost that was in the prefix cache",
        retired_by=_RETIRED_BY,
    ),
    Seam(
        name="lmcache_requests",
        module=f"{_INTEGRATION}.vllm_multi_process_adapter",
        qualname="LMCacheMPSchedulerAdapter.maybe_submit_lookup_request",
        parameters=("self", "request_id", "token_ids", "cache_salt"),
        contains=("lookup_tokens = max(0, len(token_ids) - int(reserve_last_token))",),
        why="looks up whole chunks of the tokens that it is given",
        retired_by=_RETIRED_BY,
    ),
)


def limit_requests(
    scheduler: Scheduler, connector: Any, load_end: Callable[[Request], int], alignment: int
) -> None:
    """Have a connector of LMCache share what may be shared, and name it by the settings.

    Args:
        load_end: where what is shared of a request ends.
        alignment: tokens after which both a query chunk and a block end.

    Raises:
        SettingsError: where LMCache's chunks do not hold whole query chunks, or the model has layers of
            several kinds.
        SeamBroken: where LMCache is not what this relies on.
    """
    for seam in SEAMS:
        seam.require()
    _check(connector, alignment, len(scheduler.kv_cache_config.kv_cache_groups))
    make_tracker = connector._get_or_create_request_tracker
    formats = number_formats(scheduler.vllm_config)

    def make_limited_tracker(request: Request) -> Any:
        known = connector.request_trackers.get(request.request_id)
        tracker = make_tracker(request)
        if tracker is not known:
            end = load_end(request)
            tracker.all_token_ids = tracker.all_token_ids[:end]
            tracker.mm_adjusted_prompt_ids = tracker.mm_adjusted_prompt_ids[:end]
            tracker.cache_salt = _salt(request, end, formats)
        return tracker

    connector._get_or_create_request_tracker = make_limited_tracker


def lost_blocks(scheduler: Scheduler, reported: set[int]) -> set[int]:
    """Those of the blocks of a failed load that LMCache was to write."""
    blocks = scheduler.kv_cache_manager.block_pool.blocks
    # What is loaded between steps enters the prefix cache when it is there.
    return {block_id for block_id in reported if blocks[block_id].block_hash is None}


def _check(connector: Any, alignment: int, num_groups: int) -> None:
    if num_groups > 1:
        raise SettingsError(
            f"{LMCACHE} cannot be used with this model, whose layers keep {num_groups} kinds of blocks: no "
            "test has shown what is loaded of them. Take another KV connector, or none."
        )
    chunk = connector.scheduler_adapter.lmcache_tokens_per_chunk
    if chunk % alignment:
        raise SettingsError(
            f"LMCache's chunks of {chunk} tokens do not hold whole query chunks: their first blocks would "
            f"depend on tokens behind them, and other prompts would find them. Start LMCache's server with "
            f"--chunk-size {alignment}, or a multiple of it."
        )


def _salt(request: Request, end: int, formats: str) -> str:
    """All that the blocks of a request's first tokens hold, but for the model and the tokens."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    hasher: SettingsHasher = request._tokenselect_hasher
    theirs, _ = generate_block_hash_extra_keys(request, 0, end, 0)
    parts = hasher.key(request), theirs, formats
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
