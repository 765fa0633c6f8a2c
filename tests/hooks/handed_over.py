"""Two engines, of which one computes prompts and the other one reads them through vLLM's NIXL connector.

vLLM's own connector decides what is asked for, and vLLM's own rule which blocks belong together. What NIXL
itself would do, copying blocks from one server's memory to the other's, is done here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

from tests.hooks.transfers import LOST, Connected
from tests.hooks.workload import Arrival


class Linked(Connected):
    """One of the two engines."""

    def make_worker(self, config: Any) -> Reading:
        return Reading(self)


class Reading:
    """The worker's half: reads blocks of the other engine, some steps late, or fails to."""

    def __init__(self, engine: Linked) -> None:
        self.engine = engine
        self.other: Linked | None = None
        self.fails = engine.transfer.kv_connector_extra_config.get("fails", False)
        self.under_way: list[tuple[str, Any, int]] = []
        self.asked = 0
        self.step = 0
        self.read_by_other: set[str] = set()
        self.done_at_once: set[str] = set()

    def bind_connector_metadata(self, meta: Any) -> None:
        self.meta = meta

    def handle_preemptions(self, meta: Any) -> None: ...
    def wait_for_save(self) -> None: ...
    def build_connector_worker_meta(self) -> None: ...

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()

    def start_load_kv(self, context: Any) -> None:
        self.asked += len(self.meta.reqs_to_recv)
        for id_, meta in self.meta.reqs_to_recv.items():
            if any(meta.local_block_ids):
                ready = self.step + self.engine.random.choice((0, 1, 4))
                self.under_way.append((id_, meta, ready))
            else:
                self.tell_other(meta)
        self.meta.reqs_to_recv = {}

    def tell_other(self, meta: Any) -> None:
        self.other.worker.read_by_other.add(meta.remote.request_id)

    def read(self, meta: Any) -> None:
        rule = NixlBaseConnectorWorker._apply_prefix_caching
        (here,), (there,) = rule(
            SimpleNamespace(_has_mamba=False), meta.local_block_ids, meta.remote.block_ids, 1, 1
        )
        self.engine.caches[0][here] = self.other.caches[0][there]
        self.engine.loaded += len(here) * self.engine.caches[0].shape[1]

    def get_transfer_results(self, finished_req_ids: set[str]) -> Reading:
        self.step += 1
        ready = [job for job in self.under_way if job[-1] < self.step]
        self.under_way = [job for job in self.under_way if job[-1] >= self.step]
        self.failed_recving: set[str] = set()
        for id_, meta, _ in ready:
            self.read(meta)
            if self.fails and self.engine.random.random() < 0.4:
                self.engine.caches[0][meta.local_block_ids[0][-1]] = LOST
                self.failed_recving.add(id_)
            self.tell_other(meta)
        self.finished_recving = {id_ for id_, _, _ in ready}
        self.finished_sending, self.read_by_other = self.read_by_other, set()
        return self


def serve_apart(
    prefill: Linked, decode: Linked, arrivals: Sequence[Arrival], others: Sequence[int] = ()
) -> None:
    """Have one engine compute each prompt, and then the other one answer.

    Args:
        others: arrivals of which each is offered what belongs to the next one among them.
    """
    prefill.worker.other, decode.worker.other = decode, prefill
    numbers = sorted(range(len(arrivals)), key=lambda number: arrivals[number].step)
    asked: dict[str, int] = {}
    offers: dict[int, dict[str, Any]] = {}
    answered: set[int] = set()
    others = [number for number in others if number < len(arrivals)]
    offered = dict(
        zip(others, [*others[1:], *others[:1]], strict=True)
    )  # each once, as it is good for
    for step in range(6000):
        while numbers and arrivals[numbers[0]].step <= step:
            number = numbers.pop(0)
            wanted = {"do_remote_decode": True, "do_remote_prefill": False}
            arrival = replace(arrivals[number], max_tokens=1, transfer=wanted)
            asked[prefill.add(arrival).request_id] = number
        prefill.step()
        for id_ in prefill.ends.keys() & asked.keys():
            # As a router hands it on.
            offers[asked.pop(id_)] = json.loads(json.dumps(prefill.ends[id_].kv_transfer_params))
        for number in sorted(offers.keys() - answered):
            offer = offers.get(offered.get(number, number))
            if offer is not None:
                decode.add(replace(arrivals[number], transfer=offer))
                answered.add(number)
        decode.step()
        if len(answered) == len(arrivals) and not decode.unfinished():
            return
    raise AssertionError(f"not at an end: {[r.request_id for r in decode.unfinished()]}")
