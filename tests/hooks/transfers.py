"""Engines with a KV connector, whose KV cache holds what each token was computed from.

There is no model. A slot of the cache holds a number for the chunk that computed it: where the chunk began,
and all tokens up to its end, which its selection depends on. So a wrong block is seen when it is read, and
one that is not there yet, and a token that was computed in another chunk than its request's.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec
from vllm.v1.kv_offload.base import TransferResult
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from tests.hooks.workload import Arrival, Engine, Workload
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks.block_hashes import SettingsHasher
from vllm_tokenselect.method.settings import Method

NOTHING, LOST = 0, -1


def contents_of(tokens: list[int], num_prompt_tokens: int, method: Method) -> np.ndarray:
    """What each token of a request is computed from, as one number, int64 [tokens]."""
    beginnings = [0]
    for token in tokens:
        beginnings.append(hash((beginnings[-1], token)))
    contents, start = [], 0
    tail = method.tail_start(num_prompt_tokens)
    while start < len(tokens):
        end = start + (method.next_chunk(num_prompt_tokens, start) if start < tail else 1)
        contents += [hash((start, beginnings[end])) or 1] * (end - start)
        start = end
    return np.array(contents, np.int64)


class Connected(Workload):
    """Runs requests through the scheduler of an engine with a connector, and checks all that is read."""

    def __init__(
        self,
        engine: Engine,
        template: Any,
        connector: str = "OffloadingConnector",
        extra: dict[str, Any] | None = None,
        policy: str = "recompute",
        seed: int = 0,
    ) -> None:
        self.transfer = KVTransferConfig(
            kv_connector=connector,
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 1 << 30, **(extra or {})},
            kv_load_failure_policy=policy,
            kv_connector_module_path=__name__ if connector == "Losing" else None,
        )
        self.random = random.Random(seed)
        super().__init__(engine, template)
        config = self.scheduler.vllm_config
        self.method = self.scheduler.chunks
        self.caches = [
            np.zeros((engine.num_blocks(), group.kv_cache_spec.block_size), np.int64)
            for group in engine.groups()
        ]
        self.expected: dict[str, np.ndarray] = {}
        self.loaded = 0
        self.worker = self.make_worker(config)

    def make_worker(self, config: Any) -> Any:
        if self.transfer.kv_connector == "Losing":
            return LosingWorker(self)
        worker = OffloadingConnector(config, KVConnectorRole.WORKER, self.kv_cache_config)
        worker.connector_worker.worker = Copies(self)
        return worker

    def configure(self, engine: Engine, template: Any) -> Any:
        config = super().configure(engine, template)
        config.kv_transfer_config = self.transfer
        config.cache_config.kv_cache_layout = "LBHNC"
        return config

    def make_hasher(self, config: Any, hasher: Any) -> SettingsHasher:
        settings = TokenSelectConfig.from_additional_config(config.additional_config)
        return SettingsHasher(hasher, settings, 1, self.engine.block_size, self.lookahead)

    def add(self, arrival: Arrival, request_id: str | None = None) -> Request:
        request = super().add(arrival, request_id)
        tokens = arrival.tokens + [7] * arrival.max_tokens
        self.expected[request.request_id] = contents_of(tokens, len(arrival.tokens), self.method)
        return request

    def run_model(self, output: SchedulerOutput) -> KVConnectorOutput:
        worker, scheduled = self.worker, self.steps[self.first_of_steps[-1] :]
        worker.bind_connector_metadata(output.kv_connector_metadata)
        worker.handle_preemptions(output.kv_connector_metadata)
        if output.has_sync_kv_loads:
            worker.start_load_kv(None)
        lost = set(worker.get_block_ids_with_load_errors())
        for request, start, end, _ in scheduled:
            self.compute(request, start, end, lost)
        if not output.has_sync_kv_loads:
            worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        return KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=lost | set(worker.get_block_ids_with_load_errors()),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )

    def compute(self, request: Request, start: int, end: int, lost: set[int]) -> None:
        """Compute a request's next tokens from those before them.

        Args:
            lost: blocks of which the scheduler will be told that they hold nothing. It drops the step.
        """
        expected = self.expected[request.request_id]
        for cache, group, blocks in zip(
            self.caches, self.engine.groups(), self.blocks(request.request_id), strict=True
        ):
            spec = group.kv_cache_spec
            if isinstance(spec, MambaSpec):  # a block holds the state behind its last token
                if start:
                    state = cache[blocks[(start - 1) // spec.block_size], 0]
                    assert state == expected[start - 1], f"{request.request_id}: state at {start}"
                if end <= len(expected):
                    cache[blocks[(end - 1) // spec.block_size]] = expected[end - 1]
                continue
            first = 0
            if isinstance(spec, SlidingWindowSpec):
                first = max(start - spec.sliding_window + 1, 0)
            before = np.arange(first, start)
            held = blocks[first // spec.block_size : -(-start // spec.block_size)]
            if not lost.intersection(held):
                read = cache[
                    np.array(blocks, int)[before // spec.block_size], before % spec.block_size
                ]
                wrong = before[read != expected[first:start]]
                assert not len(wrong), (
                    f"request {request.request_id} of {request.num_prompt_tokens} tokens computes "
                    f"[{start}, {end}) and reads something else at {wrong[0]} to {wrong[-1]}"
                )
            written = np.arange(start, min(end, len(expected)))
            slots = np.array(blocks, int)[written // spec.block_size], written % spec.block_size
            cache[slots] = expected[written]
        # vLLM's null block, which windows leave behind.
        for cache in self.caches:
            cache[0] = NOTHING

    def blocks(self, request_id: str) -> tuple[list[int], ...]:
        blocks: tuple[list[int], ...] = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return blocks


class Copies:
    """Copies between an engine's cache and what vLLM's offloading keeps, some steps late."""

    def __init__(self, engine: Connected) -> None:
        self.engine = engine
        self.kept: dict[tuple[int, int], np.ndarray] = {}
        self.under_way: deque[tuple[int, Any, Any, bool, int]] = deque()
        self.step = 0
        self.done: list[TransferResult] = []

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        return self._submit(job_id, source, target, True)

    def submit_load(self, job_id: int, source: Any, target: Any, expedited: bool = False) -> bool:
        return self._submit(job_id, target, source, False)

    def _submit(self, job_id: int, cached: Any, kept: Any, is_store: bool) -> bool:
        ready = self.step + self.engine.random.choice((0, 1, 3))
        self.under_way.append((job_id, cached, kept, is_store, ready))
        return True

    def get_finished(self) -> list[TransferResult]:
        self.step += 1
        while self.under_way and self.under_way[0][-1] < self.step:
            self._copy(*self.under_way.popleft())
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        for job in [job for job in self.under_way if job[0] in job_ids]:
            self.under_way.remove(job)
            self._copy(*job)

    def _copy(self, job_id: int, cached: Any, kept: Any, is_store: bool, _: int) -> None:
        blocks, chunks = iter(cached.block_ids.tolist()), iter(kept.block_ids.tolist())
        for cache, size in zip(self.engine.caches, cached.group_sizes, strict=True):
            for _ in range(size):
                block, chunk = next(blocks), next(chunks)
                if is_store:
                    self.kept[chunk, 0] = cache[block].copy()
                else:
                    cache[block] = self.kept[chunk, 0]
                    self.engine.loaded += cache.shape[1]
        self.done.append(TransferResult(job_id, True))


class Losing(KVConnectorBase_V1, SupportsHMA):
    """Says of any prompt that it holds any number of its tokens; the scheduler's half.

    It holds what any prompt with the same beginning may have computed. So past the request's limit, where
    that depends on where a prompt ends, what it hands over is wrong.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.random = random.Random(extra["seed"])
        self.modes = extra["modes"]
        self.loads: dict[str, tuple[int, int, bool]] = {}
        self.found: dict[str, tuple[int, bool]] = {}

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self.random.random() < 0.2:
            return None, False
        most = request.num_tokens - 1 - num_computed_tokens
        found = self.random.randint(0, max(most, 0))
        later = self.random.choice(self.modes) == "later"
        self.found[request.request_id] = num_computed_tokens, later
        return found, later and found > 0

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if num_external_tokens:
            start, later = self.found[request.request_id]
            self.loads[request.request_id] = start, start + num_external_tokens, later

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        meta = KVConnectorMetadata()
        meta.loads, self.loads = self.loads, {}
        return meta

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        return False, None

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, None]:
        return False, None

    # The worker's half is below.
    def start_load_kv(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...


class LosingWorker:
    """Loads what `Losing` promised, at once or some steps later, and loses some of it if it is told to."""

    def __init__(self, engine: Connected) -> None:
        self.engine = engine
        self.loses = engine.transfer.kv_connector_extra_config["loses"]
        self.under_way: list[tuple[str, int, int, int]] = []
        self.meta: Any = None
        self.step = 0
        self.lost: set[int] = set()
        self.failed: set[str] = set()
        self.finished: set[str] = set()

    def bind_connector_metadata(self, meta: Any) -> None:
        self.meta = meta

    def handle_preemptions(self, meta: Any) -> None: ...
    def wait_for_save(self) -> None: ...

    def build_connector_worker_meta(self) -> None: ...

    def start_load_kv(self, context: Any) -> None:
        for id_, (start, end, later) in self.meta.loads.items():
            if later:
                ready = self.step + self.engine.random.choice((0, 1, 4))
                self.under_way.append((id_, start, end, ready))
            else:
                self.load(id_, start, end)

    def load(self, id_: str, start: int, end: int) -> None:
        engine, random_ = self.engine, self.engine.random
        limit = engine.method.shareable_tokens(engine.requests[id_].num_prompt_tokens)
        contents = engine.expected[id_].copy()
        contents[limit:] = LOST
        engine.loaded += end - start
        loses_all = self.loses and len(engine.caches) > 1 and random_.random() < 0.4
        for cache, blocks in zip(engine.caches, engine.blocks(id_), strict=True):
            size = cache.shape[1]
            for first in range(start - start % size, end, size):
                block = blocks[first // size]
                if block == 0:
                    continue
                inside = np.arange(max(first, start), min(first + size, end))
                cache[block, inside % size] = contents[inside]
                loses = self.loses and len(engine.caches) == 1 and random_.random() < 0.15
                if loses or loses_all:
                    cache[block, inside % size] = LOST
                    self.lost |= {block} if loses else set()
        if loses_all:
            self.failed.add(id_)

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost, self.lost = self.lost, set()
        return lost

    def get_transfer_results(self, finished_req_ids: set[str]) -> LosingWorker:
        self.step += 1
        ready = [job for job in self.under_way if job[-1] < self.step]
        self.under_way = [job for job in self.under_way if job[-1] >= self.step]
        self.failed = set()
        for id_, start, end, _ in ready:
            self.load(id_, start, end)
        self.finished_sending: set[str] = set()
        self.finished_recving = {job[0] for job in ready}
        self.failed_recving = set(self.failed)
        return self
