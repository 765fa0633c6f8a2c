"""What a request may take from a KV connector, and where it goes on when that fails.

1. A load ends at the request's own limit, and where a query chunk and a block of every group of layers end,
   as a hit in the prefix cache does. What follows is computed, as whole chunks.
2. A request whose load failed goes on where the chunk of its first lost block begins. It asks no connector
   again, which might lose the same block for ever.
3. What lies past the limit is not offered to vLLM's offloading. Its name would fit no other request
   (`block_hashes`), and its room would be wasted.
4. `ExampleConnector`, which names files by the tokens of a whole prompt, sees only requests with the
   server's own settings, whose files are complete.
5. LMCache is shown no more of a request than may be shared (`lmcache_requests`).
6. `NixlConnector`, which names nothing, reads what was computed for the same prompt (`nixl_transfers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from vllm.v1.request import RequestStatus

from vllm_tokenselect.engine import connectors
from vllm_tokenselect.hooks import lmcache_requests, nixl_transfers
from vllm_tokenselect.hooks.nixl_transfers import Find, Match
from vllm_tokenselect.hooks.scheduler_seams import CONNECTOR_SEAMS
from vllm_tokenselect.method.request_settings import requested_top_k

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.request import Request

    from vllm_tokenselect.config import TokenSelectConfig
    from vllm_tokenselect.method.settings import Method
else:
    _Scheduler = object  # vLLM's comes last among the bases


class LimitLoads(_Scheduler):
    """The rules, to be put before vLLM's scheduler among the bases of a class."""

    tokenselect: TokenSelectConfig
    chunks: Method
    _alignment: int

    def _shareable_tokens(self, request: Request) -> int:
        """Tokens at the start of a request's prompt that others may share."""
        raise NotImplementedError

    def _limit_connectors(self) -> None:
        self._asked_to_wait = False
        self._reports_cached_blocks = False
        if self.connector is None:
            return
        for seam in CONNECTOR_SEAMS:
            seam.require()
        for connector in _leaves(self.connector):
            find = connector.get_num_new_matched_tokens
            if hasattr(connector, "_max_loadable_tokens"):
                find = self._ask_offloading(connector, find)
            elif connectors.carries_tokens_alone(connector):
                find = self._ask_example(connector, find)
            elif connectors.hands_over_requests(connector):
                nixl_transfers.check_layers(self.kv_cache_config)
                nixl_transfers.say_what_was_computed(connector)
                find = nixl_transfers.find_handed_over(self._ask_any(find), self.block_size)
            else:
                if connectors.carries_trackers(connector):
                    self._reports_cached_blocks = True
                    lmcache_requests.limit_requests(
                        self, connector, self._load_end, self._alignment
                    )
                find = self._ask_any(find)
            connector.get_num_new_matched_tokens = self._noting_waits(find)

    def _load_end(self, request: Request, num_prompt_tokens: int | None = None) -> int:
        """Where a load ends at the latest."""
        if hasattr(request, "_tokenselect_load_failed"):
            return 0
        # The last token is computed anyhow, and its chunk with it.
        end: int = min(self._shareable_tokens(request), request.num_tokens - 1)
        if num_prompt_tokens is not None:
            end = min(end, self.chunks.shareable_tokens(num_prompt_tokens))
        return end // self._alignment * self._alignment

    def _ask_any(self, find: Find, num_prompt_tokens: int | None = None) -> Find:
        """Cut what a connector finds, which it may then load a part of."""

        def find_below_limit(request: Request, num_computed_tokens: int) -> Match:
            found, later = find(request, num_computed_tokens)
            if found is None:
                return None, False
            end = min(num_computed_tokens + found, self._load_end(request, num_prompt_tokens))
            loaded = end // self._alignment * self._alignment - num_computed_tokens
            return (loaded, later) if loaded > 0 else (0, False)

        return find_below_limit

    def _ask_offloading(self, connector: Any, find: Find) -> Find:
        """Have vLLM's offloading look up what ends at the limit.

        Looked up again rather than cut: of a layer with a window it holds only what lies before the end of
        a hit.
        """
        bound = connector._max_loadable_tokens
        # With such layers vLLM takes one token less than it is allowed.
        one_more = int(bool(connector.connector_scheduler._sliding_window_groups))
        limit = 0

        def bound_by_limit(request: Request, num_computed_tokens: int) -> int:
            most = max(limit + one_more - num_computed_tokens, 0)
            theirs = bound(request, num_computed_tokens)
            return most if theirs is None else min(most, theirs)

        def find_below_limit(request: Request, num_computed_tokens: int) -> Match:
            nonlocal limit
            limit = self._load_end(request)
            while True:
                found, later = find(request, num_computed_tokens)
                if not found:
                    return found, False
                end = num_computed_tokens + found
                if end <= limit and end % self._alignment == 0:
                    return found, later
                limit = (min(end, limit) - 1) // self._alignment * self._alignment

        connector._max_loadable_tokens = bound_by_limit
        return find_below_limit

    def _ask_example(self, connector: Any, find: Find) -> Find:
        """Ask for prompts of which every file is there. Others are computed."""
        names = [
            name for group in self.kv_cache_config.kv_cache_groups for name in group.layer_names
        ]
        build_meta = connector.build_connector_meta
        block = self.cache_config.block_size

        def find_whole(request: Request, num_computed_tokens: int) -> Match:
            tokens = request.num_prompt_tokens
            # It writes whole blocks of all but the last token, and looks for those of all but two.
            held = (tokens - 1) // block * block
            if tokens % block == 1 or request.num_preemptions or not self._is_plain(request):
                return 0, False
            folder = connector._generate_foldername_debug(
                _as_tensor(request.prompt_token_ids[:held]),
                [feature.identifier for feature in request.mm_features],
            )
            if not _are_whole((Path(folder) / f"{name}.safetensors" for name in names), held):
                return 0, False
            # Whoever wrote them may have had a prompt as short as `held`, and a lower limit.
            return self._ask_any(find, held)(request, num_computed_tokens)

        def build_meta_of_plain_requests(output: SchedulerOutput) -> Any:
            new = [r for r in output.scheduled_new_reqs if self._is_plain(self.requests[r.req_id])]
            return build_meta(dataclasses.replace(output, scheduled_new_reqs=new))

        connector.build_connector_meta = build_meta_of_plain_requests
        return find_whole

    def _is_plain(self, request: Request) -> bool:
        """Whether the prompt's tokens and the server's settings say all of what a request computes."""
        extra_args = getattr(request.sampling_params, "extra_args", None)
        top_k = self.tokenselect.top_k
        return (
            requested_top_k(extra_args, top_k) == top_k
            and request.prompt_token_ids is not None
            and request.lora_request is None
            and request.cache_salt is None
        )

    def _noting_waits(self, find: Find) -> Find:
        def find_and_note(request: Request, num_computed_tokens: int) -> Match:
            match = find(request, num_computed_tokens)
            self._asked_to_wait |= match[0] is None
            return match

        return find_and_note

    def _waits_for_connector(self) -> bool:
        """Whether requests wait for a connector, since this was asked last or now."""
        if self.connector is None:
            return False
        waits, self._asked_to_wait = self._asked_to_wait, False
        loading = RequestStatus.WAITING_FOR_REMOTE_KVS
        return waits or any(request.status == loading for request in self.kv_holding_waiting)

    def add_request(self, request: Request) -> None:
        if any(hasattr(each, "_max_loadable_tokens") for each in _leaves(self.connector)):
            params = request.kv_transfer_params or {}
            wanted, limit = params.get("max_offload_tokens"), self._shareable_tokens(request)
            if not isinstance(wanted, int) or not 0 <= wanted <= limit:
                request.kv_transfer_params = {**params, "max_offload_tokens": limit}
        super().add_request(request)

    def _update_requests_with_invalid_blocks(
        self,
        requests: Iterable[Request],
        invalid_block_ids: set[int],
        num_scheduled_tokens: dict[str, int],
        evict_blocks: bool = True,
    ) -> tuple[set[str], int, set[int]]:
        requests = list(requests)
        if self._reports_cached_blocks:
            invalid_block_ids = lmcache_requests.lost_blocks(self, invalid_block_ids)
        lost = {
            request.request_id: self._first_lost_token(
                request, invalid_block_ids, num_scheduled_tokens.get(request.request_id, 0)
            )
            for request in requests
        }
        result: tuple[set[str], int, set[int]] = super()._update_requests_with_invalid_blocks(
            requests, invalid_block_ids, num_scheduled_tokens, evict_blocks
        )
        for request in requests:
            if request.request_id in result[0]:
                # vLLM lets one of those that share a lost block compute it, perhaps later than the others
                # read it. Here each does, and writes the same.
                start = lost[request.request_id]
                request.num_computed_tokens = start - start % self.chunks.query_chunk
                request._tokenselect_load_failed = True
        if evict_blocks:
            # vLLM leaves them to be found, and counts on them to be computed in the next step.
            self.kv_cache_manager.evict_blocks(result[2])
        return result

    def _first_lost_token(self, request: Request, lost: set[int], num_scheduled: int) -> int:
        computed: int = request.num_computed_tokens - num_scheduled
        (blocks,) = self.kv_cache_manager.get_block_ids(request.request_id)
        starts = range(0, computed, self.block_size)
        return next(
            (start for start, block in zip(starts, blocks, strict=False) if block in lost), computed
        )

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        if request.request_id in self.failed_recving_kv_req_ids:
            request._tokenselect_load_failed = True
        super()._update_waiting_for_remote_kv(request)


def _leaves(connector: Any) -> list[Any]:
    """The connectors that carry something: one, or those of a MultiConnector."""
    if connector is None:
        return []
    children = getattr(connector, "sub_connectors", None)
    return [connector] if children is None else [leaf for c in children for leaf in _leaves(c)]


def _as_tensor(tokens: list[int]) -> Any:
    import torch

    return torch.tensor(tokens)


def _are_whole(files: Iterable[Path], num_tokens: int) -> bool:
    """Whether each file holds so many tokens. One that is being written, or whose writer died, does not."""
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                if opened.get_slice("kv_cache").get_shape()[0] != num_tokens:
                    return False
    except (OSError, SafetensorError):
        return False
    return True
