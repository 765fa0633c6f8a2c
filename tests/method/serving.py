"""One layer served step by step, and what the definition says that its requests attend to."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from tests.method.definition import BLOCK_SIZE, HEAD_SIZE, SCALE
from tests.oracle.model import attended_positions, query_chunks
from tests.oracle.step import sdpa_attention
from vllm_tokenselect.counters import Counter
from vllm_tokenselect.cpu.step import CpuStep
from vllm_tokenselect.kernels.head_group import HeadGroup
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests, RequestTable, StepRequests
from vllm_tokenselect.method.settings import Method

METHOD = Method(
    top_k=24,
    n_init=4,
    n_local=16,
    query_chunk=32,
    tail_queries=3,
    similarity_threshold=0.9,
    refresh_interval=5,
)
HEADS, KV_HEADS = 6, 2
CAPACITY, TOKENS = 3, 200


class Request:
    """Queries, keys and values of one request, and what the definition says it attends to."""

    def __init__(
        self,
        name: str,
        prompt: int,
        top_k: int = METHOD.top_k,
        noise: float = 0.12,
        kv_heads: int = KV_HEADS,
    ):
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        self.name, self.prompt, self.top_k, self.done = name, prompt, top_k, 0
        steps = torch.randn(TOKENS, HEADS, HEAD_SIZE, generator=generator)
        steps[1:] *= noise
        self.queries = steps.cumsum(0)
        self.keys, self.values = torch.randn(
            2, TOKENS, kv_heads, HEAD_SIZE, generator=generator
        ).unbind(0)
        self.define()

    def share(self, rank: int, ranks: int, apart: bool) -> Request:
        """The heads of one rank; what they attend to is what all of them select, or they `apart`."""
        own = copy.copy(self)
        heads, kv_heads = self.queries.shape[1] // ranks, max(self.keys.shape[1] // ranks, 1)
        first = rank * self.keys.shape[1] // ranks
        own.queries = self.queries[:, rank * heads : (rank + 1) * heads]
        own.keys, own.values = (x[:, first : first + kv_heads] for x in (self.keys, self.values))
        if apart:
            own.define()
        return own

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def define(self) -> None:
        """Define what is attended anew, for queries or keys that were changed."""
        self.rows = dict(self._defined_rows())

    def _defined_rows(self):
        """(position, (attended positions, kind)) of every token, by the definition."""
        method, last = replace(METHOD, top_k=self.top_k), None
        keys = self.keys.transpose(0, 1)
        for chunk in query_chunks(0, TOKENS, self.prompt, method):
            before = last if chunk.start >= self.prompt else None  # a prompt's token reuses nothing
            attended, selection, _ = attended_positions(
                self.queries[chunk.start : chunk.stop], keys, chunk, SCALE, method, before
            )
            kind = "dense" if selection is None else "reselected"
            if selection is not None and selection is before:
                kind = "reused"
            last = selection if chunk.start >= self.prompt else None
            for position in chunk:
                yield position, (attended[attended <= position].tolist(), kind)

    @cache  # noqa: B019 - few requests, asked again and again
    def expected(self, position: int) -> torch.Tensor:
        attended, _ = self.rows[position]
        keys, values = (
            x[attended].repeat_interleave(self.group, dim=1) for x in (self.keys, self.values)
        )
        weights = torch.einsum("hd,nhd->hn", self.queries[position], keys) * SCALE
        return torch.einsum("hn,nhd->hd", weights.softmax(-1), values)


class Server:
    """One layer, served in steps of any requests, each in blocks of its own.

    Args:
        step_class: which.
        heads, kv_heads: of the process.
        together: the processes whose heads vote together.
    """

    def __init__(
        self,
        step_class: type[CpuStep] = CpuStep,
        heads: int = HEADS,
        kv_heads: int = KV_HEADS,
        together: HeadGroup | None = None,
    ):
        self.heads, self.together = heads, together
        self.step_class = step_class
        self.table = RequestTable(CAPACITY)
        self.counts = torch.zeros(len(Counter), dtype=torch.int64)
        width = -(-TOKENS // BLOCK_SIZE)
        blocks = torch.randperm(CAPACITY * width).to(torch.int32)
        self.blocks = dict(enumerate(blocks.view(CAPACITY, width)))
        pages = torch.zeros(CAPACITY * width, kv_heads, 2, BLOCK_SIZE, HEAD_SIZE)
        selections = SelectionCacheState.allocate(
            CAPACITY,
            METHOD.selection_size,
            heads * (together.size if together else 1),
            HEAD_SIZE,
            torch.float32,
            torch.device("cpu"),
        )
        self.cache = LayerCache(pages, selections=selections)
        self.attention = sdpa_attention(self.cache, TOKENS)

    def start(self, *requests: Request) -> None:
        for request in requests:
            self.table.add(request.name, request.prompt, request.top_k)
            request.done = 0

    def stop(self, request: Request) -> None:
        self.table.remove(request.name)

    def step(self, *work: tuple[Request, int]) -> torch.Tensor:
        """Compute the next tokens of each request and check them against the definition.

        Returns:
            [T, Hq, D], the output for the tokens in order.
        """
        requests = [request for request, _ in work]
        lens = np.array([count for _, count in work], np.int32)
        seats = self.table.seats_of([request.name for request in requests])
        block_table = torch.stack([self.blocks[int(seat)] for seat in seats])
        ends = np.array([r.done for r in requests], np.int32) + lens
        for row, request in enumerate(requests):
            self._write(request, block_table[row], request.done, int(ends[row]))
        query = torch.cat([r.queries[r.done : e] for r, e in zip(requests, ends, strict=True)])
        batch = BatchRequests.of_step(StepRequests(self.table, seats), ends, METHOD.top_k)
        plan = SelectionPlan.build(np.cumsum([0, *lens]).astype(np.int32), ends, batch, METHOD)
        step = self.step_class.of_plan(
            plan,
            block_table,
            BLOCK_SIZE,
            self.heads,
            METHOD,
            self.counts,
            heads=self.together,
        )
        out = torch.full_like(query, float("nan"))
        step.run_layer(query, self.cache, SCALE, self.attention, out)
        positions = [(r, p) for r, e in zip(requests, ends, strict=True) for p in range(r.done, e)]
        expected = torch.stack([request.expected(position) for request, position in positions])
        torch.testing.assert_close(out, expected, rtol=2e-4, atol=2e-5)
        for request, end in zip(requests, ends, strict=True):
            request.done = int(end)
        return out

    def _write(self, request: Request, blocks: torch.Tensor, first: int, end: int) -> None:
        positions = torch.arange(first, end)
        where = blocks[positions // BLOCK_SIZE].long(), slice(None)
        self.cache.pages[*where, 0, positions % BLOCK_SIZE] = request.keys[first:end]
        self.cache.pages[*where, 1, positions % BLOCK_SIZE] = request.values[first:end]
