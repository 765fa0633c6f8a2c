"""SelectionPlan: the chunks of one step, from query lengths, context lengths and prompt lengths.

Host work, done once per step and shared by all layers. A *row* is one chunk: the queries that select
together and attend to the same tokens. Prompt chunks, the prompt's tail and generated tokens are
rows of the same plan; they differ in their number of queries only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_tokenselect.counters import Counter
from vllm_tokenselect.method.requests import NO_SEAT, BatchRequests, Int32
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SelectionPlan:
    """Rows of one step, in order of their queries.

    Attributes:
        row_seq: int32 [R], the row's request, as an index into the step's batch.
        query_start: int32 [R], first query of the row in the step's flattened queries.
        query_len: int32 [R], number of queries.
        chunk_start: int32 [R], position `a` of the first query.
        chunk_end: int32 [R], position `b` one past the last query: the row's context length.
        candidate_end: int32 [R], `a - n_local`; candidates are `[n_init, candidate_end)`.
        top_k: int32 [R], candidates that the row selects; `FULL_ATTENTION` for a generated token that
            attends to everything (`Method.min_context`).
        dense: bool [R], the row attends to its whole context.
        seat: int32 [R], of the row's request; -1 if the row belongs to none.
        owner: int32 [R], which owner of the seat that is.
        generated: bool [R], the row is a generated token of a request.
        follows: bool [R], the row is a generated token that selects. In a layer that is no anchor it
            attends to what the anchor below has selected.
        caches: bool [R], the row takes part in the Selection Cache of anchors.
    """

    row_seq: Int32
    query_start: Int32
    query_len: Int32
    chunk_start: Int32
    chunk_end: Int32
    candidate_end: Int32
    top_k: Int32
    dense: npt.NDArray[np.bool_]
    seat: Int32
    owner: Int32
    generated: npt.NDArray[np.bool_]
    follows: npt.NDArray[np.bool_]
    caches: npt.NDArray[np.bool_]

    @property
    def num_rows(self) -> int:
        return len(self.row_seq)

    @cached_property
    def kinds(self) -> list[int]:
        """Of each row, ascending in the order of `by_kind`; an odd one has several queries."""
        kinds: list[int] = (4 * ~self.dense + 2 * ~self.follows + (self.query_len > 1)).tolist()
        return kinds

    def by_kind(self) -> SelectionPlan:
        """The same rows: dense ones, then those that follow, then others; of one query before several."""
        if self.kinds == sorted(self.kinds):  # as in most steps that decode
            return self
        order = np.argsort(self.kinds, kind="stable")
        return SelectionPlan(**{f.name: getattr(self, f.name)[order] for f in fields(self)})

    @classmethod
    def build(
        cls,
        query_start_loc: Int32,
        seq_lens: Int32,
        requests: BatchRequests,
        method: Method,
    ) -> SelectionPlan:
        """Cut a step into rows.

        Args:
            query_start_loc: int32 [S + 1], where each request's queries start; a request without
                any (padding) gets no row.
            seq_lens: int32 [S], context length of each request, this step's tokens included.
            requests: of the batch.
            method: the settings, but for `top_k`, which is each request's own.
        """
        query_lens = query_start_loc[1:] - query_start_loc[:-1]
        if (query_lens <= 1).all():
            # A decoding step; no loop over requests.
            seqs = np.flatnonzero(query_lens).astype(np.int32)
            end = seq_lens[seqs]
            start, query_start = end - np.int32(1), query_start_loc[seqs]
        else:
            parts = [
                _chunk_edges(
                    int(end - length),
                    int(end),
                    method.tail_start(int(prompt_len)),
                    replace(method, top_k=int(top_k)),
                )
                for end, length, prompt_len, top_k in zip(
                    seq_lens, query_lens, requests.prompt_lens, requests.top_k, strict=True
                )
            ]
            seqs = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
            edges = np.concatenate(parts)
            start, end = edges[:, 0].astype(np.int32), edges[:, 1].astype(np.int32)
            first_position = seq_lens - query_lens
            query_start = query_start_loc[:-1][seqs] + start - first_position[seqs]
        candidate_end = start - np.int32(method.n_local)
        seat = requests.seats[seqs]
        generated = (start >= requests.prompt_lens[seqs]) & (seat != NO_SEAT)
        short = generated & (end <= method.min_context)
        top_k = np.where(short, np.int32(FULL_ATTENTION), requests.top_k[seqs])
        dense = candidate_end - method.n_init <= top_k
        follows = generated & ~dense
        return cls(
            row_seq=seqs,
            query_start=query_start.astype(np.int32, copy=False),
            query_len=end - start,
            chunk_start=start,
            chunk_end=end,
            candidate_end=candidate_end,
            top_k=top_k,
            dense=dense,
            seat=seat,
            owner=requests.owners[seqs],
            generated=generated,
            follows=follows,
            caches=follows & method.reuses_selections,
        )

    def lengths(self, method: Method) -> Int32:
        """Tokens that the last query of each row attends to if the row selects anew, int32 [R]."""
        selecting = self.top_k + self.query_len + np.int32(method.n_init + method.n_local)
        return np.where(self.dense, self.chunk_end, selecting)

    def num_attended(self, method: Method) -> Int64:
        """Keys read by each row if it selects anew, summed over its queries, int64 [R]."""
        return self._sum_over_queries(self.lengths(method))

    def num_in_context(self) -> Int64:
        """Keys that full attention would read for each row, summed over its queries, int64 [R]."""
        return self._sum_over_queries(self.chunk_end)

    def _sum_over_queries(self, lengths: Int32) -> Int64:
        """Of rows whose last query sees so many tokens, the one before it one less, and so on."""
        queries = self.query_len.astype(np.int64)
        total: Int64 = queries * lengths - (queries * (queries - 1) >> 1)
        return total

    def fixed_counts(self, method: Method, follows: bool = False) -> Int64:
        """What a layer adds to the counters for the rows that take no part in the Selection Cache.

        Args:
            follows: whether the layer is no anchor.

        Returns:
            int64 [len(Counter)].
        """
        counted = (self.seat != NO_SEAT) & ~self.caches
        if not counted.any():
            return np.zeros(len(Counter), np.int64)
        shared = np.count_nonzero(counted & self.follows) if follows else 0
        dense = np.count_nonzero(counted & self.dense)
        counts = np.zeros(len(Counter), np.int64)
        counts[Counter.RESELECTED] = np.count_nonzero(counted) - dense - shared
        counts[Counter.SHARED] = shared
        counts[Counter.DENSE] = dense
        counts[Counter.ATTENDED] = self.num_attended(method) @ counted
        counts[Counter.CONTEXT] = self.num_in_context() @ counted
        return counts


def _chunk_edges(start: int, end: int, tail_start: int, method: Method) -> npt.NDArray[np.int32]:
    """Rows `[a, b)` of the positions `[start, end)` of one request, int32 [rows, 2].

    Chunks that see their whole context are joined: whoever attends to everything attends to the same
    keys however it is cut, and one long row costs less than many short ones.
    """
    if start == end:
        return np.empty((0, 2), np.int32)
    chunk = method.query_chunk
    chunked_end = min(end, tail_start)
    cuts = [start, *range(start // chunk * chunk + chunk, chunked_end, chunk)]
    cuts += range(max(start + 1, chunked_end), end)
    num_dense = sum(cut <= method.attended_before for cut in cuts)
    if num_dense > 1:
        cuts[1:num_dense] = []
    return np.array([cuts, [*cuts[1:], end]], dtype=np.int32).T
