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

from tests.hooks.transfers import LOST, Connected, LosingWorker
from tests.hooks.workload import Arrival


class Linked(Connected):
    """One of the two engines."""

    def make_worker(self, config: Any) -> Reading:
        return Reading(self)


class Reading(LosingWorker):
    """The worker's half: reads blocks of the other engine, some steps late, or fails to."""

    def __init__(self, engine: Linked) -> None:
        super().__init__(engine)
        self.other: Linked | None = None
        self.asked = 0
        self.read_by_other: set[str] = set()

    def start_load_kv(self, context: Any) -> None:
        self.asked += len(self.meta.reqs_to_recv)
        for id_, meta in self.meta.reqs_to_recv.items():
            if any(meta.local_block_ids):
                ready = self.step + self.engine.random.choice((0, 1, 4))
                self.under_way.append((id_, meta, 0, ready))
            else:
                self.tell_other(meta)
        self.meta.reqs_to_recv = {}

    def tell_other(self, meta: Any) -> None:
        self.other.worker.read_by_other.add(meta.remote.request_id)

    def load(self, id_: str, meta: Any, _: int) -> None:
        rule = NixlBaseConnectorWorker._apply_prefix_caching
        (here,), (there,) = rule(
            SimpleNamespace(_has_mamba=False), meta.local_block_ids, meta.remote.block_ids, 1, 1
        )
        self.engine.caches[0][here] = self.other.caches[0][there]
        self.engine.loaded += len(here) * self.engine.caches[0].shape[1]
        if self.loses and self.engine.random.random() < 0.4:
            self.engine.caches[0][here[-1]] = LOST
            self.failed.add(id_)
        self.tell_other(meta)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Reading:
        super().get_transfer_results(finished_req_ids)
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
