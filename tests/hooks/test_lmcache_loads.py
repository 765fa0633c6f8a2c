"""With LMCache, too, a request reads what it would have computed itself, whatever comes when.

LMCache's own connector decides what is looked up, loaded and stored. Its server and worker are stand-ins.
Runs where LMCache is installed: `make lmcache-check`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("lmcache", reason="LMCache is not installed (make lmcache-check)")

from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache.integration.vllm import lmcache_mp_connector

from tests.hooks.test_connectors import ARRIVALS, RANDOM, engines, serve
from tests.hooks.transfers import Connected, LosingWorker
from tests.hooks.workload import Arrival, Engine, start_engine
from vllm_tokenselect.config import TokenSelectConfig

pytestmark = pytest.mark.endurance


class Server:
    """What LMCache's server holds of one engine, by name; and what its scheduler asks of it."""

    def __init__(self, chunk: int) -> None:
        self.lmcache_tokens_per_chunk = chunk
        self.held: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
        self.found: dict[str, int] = {}

    def maybe_submit_lookup_request(
        self, request_id: str, token_ids: list[int], cache_salt: str, **_: Any
    ) -> None:
        size = self.lmcache_tokens_per_chunk
        ends = range(size, len(token_ids) + 1, size)
        missing = (end for end in ends if (cache_salt, tuple(token_ids[:end])) not in self.held)
        self.found[request_id] = next(missing, len(token_ids) // size * size + size) - size

    def check_lookup_result(self, request_id: str) -> int | None:
        return self.found[request_id]

    def ignore(self, *_: Any, **__: Any) -> None: ...

    cleanup_lookup_result = free_lookup_locks = end_session = report_block_allocations = ignore


class Worker(LosingWorker):
    """Copies chunks from and to the engine's cache; loads end some steps late, and may fail."""

    def start_load_kv(self, context: Any) -> None:
        for job in self.meta.requests:
            if job.direction == "RETRIEVE":
                ready = self.step + self.engine.random.choice((0, 1, 4))
                self.under_way.append((job.request_id, job, 0, ready))

    def chunks(self, job: Any) -> list[tuple[tuple[str, tuple[int, ...]], list[int]]]:
        """Name and blocks of each chunk of a load or a store."""
        (blocks,) = job.op.block_ids
        block_size = self.engine.engine.block_size
        size = self.engine.server.lmcache_tokens_per_chunk
        each = size // block_size
        return [
            (
                (job.cache_salt, tuple(job.op.token_ids[:end])),
                blocks[(end - size - job.op.start) // block_size :][:each],
            )
            for end in range(job.op.start + size, job.op.end + 1, size)
        ]

    def load(self, id_: str, job: Any, _: int) -> None:
        (cache,) = self.engine.caches
        skipped = job.op.skip_first_n_tokens // cache.shape[1]
        fails = self.fails()
        for name, blocks in self.chunks(job):
            rest = slice(skipped, None)
            cache[blocks[rest]] = -1 if fails else self.engine.server.held[name][rest]
            skipped = max(skipped - len(blocks), 0)
        self.engine.loaded += job.op.end - job.op.start
        if fails:
            self.lost |= set(job.op.flat_block_ids)  # also those that it skips, as LMCache does

    def fails(self) -> bool:
        return self.loses and self.engine.random.random() < 0.3

    def wait_for_save(self) -> None:
        for job in self.meta.requests:
            if job.direction == "STORE":
                for name, blocks in self.chunks(job):
                    self.engine.server.held[name] = self.engine.caches[0][blocks].copy()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Worker:
        super().get_transfer_results(finished_req_ids)
        self.finished_sending = set(finished_req_ids)
        return self


class KeptByLMCache(Connected):
    server: Server

    def make_worker(self, config: Any) -> Worker:
        return Worker(self)

    def configure(self, engine: Any, template: Any) -> Any:
        config = super().configure(engine, template)
        config.cache_config.mamba_cache_mode = "none"
        self.server = Server(self.chunk)
        self.patch.setattr(
            lmcache_mp_connector, "LMCacheMPSchedulerAdapter", lambda **_: self.server
        )
        return config

    def __init__(self, *args: Any, chunk: int, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.chunk, self.patch = chunk, patch
        super().__init__(*args, connector="LMCacheMPConnector", **options)


@settings(RANDOM, max_examples=600)
@given(
    engine=engines(("full",)),
    arrivals=ARRIVALS,
    times=st.sampled_from([1, 1, 2, 3]),
    seed=st.integers(0, 999),
    loses=st.booleans(),
)
def test_what_lmcache_loads_is_what_the_request_would_have_computed(
    make_vllm_config, engine, arrivals, times, seed, loses
):
    method = TokenSelectConfig(query_chunk=engine.query_chunk).method.for_blocks(engine.block_size)
    chunk = times * math.lcm(method.query_chunk, engine.block_size)
    with pytest.MonkeyPatch.context() as patch:
        running = serve(
            make_vllm_config,
            engine,
            arrivals,
            kind=KeptByLMCache,
            chunk=chunk,
            patch=patch,
            extra={"loses": loses},
            seed=seed,
        )
    if running is not None:
        assert not [end for end in running.ends.values() if end.finish_reason.name == "ERROR"]


@pytest.fixture
def start(make_vllm_config):
    """Start an engine of which the first load fails, and none after it."""
    with pytest.MonkeyPatch.context() as patch:

        def make(chunk: int, **options: Any) -> Any:
            engine = Engine(32, 0, 16, budget=68, prefix_caching=True, max_model_len=660, **options)
            running = start_engine(
                engine,
                make_vllm_config(),
                KeptByLMCache,
                chunk=chunk,
                patch=patch,
                extra={"loses": True},
            )
            running.worker.fails = itertools.chain([True], itertools.repeat(False)).__next__
            return running

        yield make


def test_what_is_stored_after_a_load_that_failed_was_computed(start):
    """The prefix cache has 32 tokens of a prompt, LMCache 160, and the load of the others fails."""
    running, longer = start(32, max_num_seqs=1), ((101, 160), (2, 300))
    for text in (((101, 160), (3, 40)), ((4, 640),), longer, ((5, 640),), longer):
        running.run([Arrival(0, text, 1)], 200)
    assert running.loaded == (160 - 32) + (448 - 96)


def test_a_load_that_fails_takes_no_blocks_from_requests_that_run(start):
    """The load begins with a whole chunk of LMCache's, half of which another request is reading."""
    running = start(64, max_num_seqs=2, asynchronous=True)
    running.run([Arrival(0, ((101, 160), (3, 40)), 1)], 200)
    running.run([Arrival(0, ((4, 640),), 1)], 200)
    reads, loads = Arrival(0, ((101, 96), (5, 60)), 60), Arrival(6, ((101, 160), (2, 60)), 1)
    running.run([reads, loads], 200)
    assert running.loaded == 128 - 64
    assert len(running.ends) == 4
    starts = [start for request, start, *_ in running.steps if request.request_id == "2"]
    assert starts == sorted(starts), "nothing was computed again"
