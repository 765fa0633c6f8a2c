"""The six verbs of a layer on a CPU, in compiled code: each names what its operation's kernel takes."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from vllm_tokenselect.cpu.rows import RowGroup
from vllm_tokenselect.kernels.attend.cpu import attend_rows
from vllm_tokenselect.kernels.block_table.cpu import build_rows
from vllm_tokenselect.kernels.cpu_arrays import LayerArrays, Queries, elements_at
from vllm_tokenselect.kernels.cpu_bf16 import holds_bf16
from vllm_tokenselect.kernels.cpu_cache import compile_once
from vllm_tokenselect.kernels.cpu_numbers import rotate_run
from vllm_tokenselect.kernels.cpu_tiles import widen
from vllm_tokenselect.kernels.cpu_vectors import LANES
from vllm_tokenselect.kernels.score.cpu import score_rows
from vllm_tokenselect.kernels.selection_cache.cpu import decide_rows, finish_rows
from vllm_tokenselect.kernels.vote.cpu import vote_rows


class StepArrays(NamedTuple):
    """What all groups of a step share, as compiled code takes it.

    Attributes:
        block_table: int32 [S, W], KV blocks of each request of the batch.
        block_size: tokens of a KV block.
        n_init: length of the sink.
        similarity_threshold, refresh_interval: of the Selection Cache.
        counters: int64 [len(Counter)].
    """

    block_table: np.ndarray
    block_size: int
    n_init: int
    similarity_threshold: np.float32
    refresh_interval: int
    counters: np.ndarray


@njit
def decide(queries, layer, group, shared):
    reused_end = np.empty(len(group.row_seq), np.int32)
    decide_rows(
        elements_at(queries.address, queries.size, layer.last_query),
        queries.distance,
        queries.tokens,
        queries.num_heads * layer.head_size,
        queries.num_kv_heads,
        group.caches,
        group.seat,
        group.owner,
        group.candidate_end,
        shared.similarity_threshold,
        shared.refresh_interval,
        layer.last_query,
        layer.last_end,
        layer.owner,
        reused_end,
    )
    return reused_end


@njit
def score(selecting, queries, layer, group, shared):
    """Scores fp32 [n, Hq, N] of the rows `selecting`."""
    head_size, num_heads = layer.head_size, queries.num_heads
    stride = (head_size + LANES - 1) // LANES * LANES
    padded = np.zeros((len(selecting), num_heads, stride), np.float32)
    flat = padded.reshape(-1)
    elements = elements_at(queries.address, queries.size, layer.last_query)
    for line in range(len(selecting) * num_heads):
        source = queries.tokens[selecting[line // num_heads]] * queries.distance
        source += line % num_heads * head_size
        widen(elements, source, head_size, flat, line * stride)  # [D]
        if layer.vote.shape[1] > 0:
            rotate_run(flat, line * stride, layer.vote, 0)
    ends = group.candidate_end[selecting]
    scores = np.empty((len(selecting), num_heads, ends.max() - shared.n_init), np.float32)
    score_rows(
        padded,
        # Of bf16 queries all numbers stay bf16 ones, unless they are rotated.
        layer.vote.shape[1] == 0 and holds_bf16(elements),
        layer.pages,
        shared.block_table,
        group.row_seq[selecting],
        shared.n_init,
        ends,
        layer.scale,
        queries.num_kv_heads,
        shared.block_size,
        head_size,
        scores,
    )
    return scores


@njit
def vote(scores):
    """Votes fp32 [n, N]; overwrites the scores."""
    votes = np.empty((scores.shape[0], scores.shape[2]), np.float32)
    vote_rows(scores, votes)
    return votes


@njit
def build_table(selecting, votes, group, shared):
    build_rows(
        selecting,
        votes,
        shared.block_table,
        group.row_seq,
        shared.n_init,
        group.top_k,
        group.candidate_end,
        group.context_end,
        shared.block_size,
        group.slots,
        group.lengths,
    )


@njit
def finish(reused_end, layer, group, shared):
    finish_rows(
        group.caches,
        reused_end,
        group.seat,
        shared.block_table,
        group.row_seq,
        shared.n_init,
        group.top_k,
        group.context_end,
        shared.block_size,
        group.slots,
        group.lengths,
        layer.selected,
        layer.followers,
        shared.counters,
    )


@compile_once()
def attend(asking, layer, rows, shared, out):
    """Attend rows of one query to what their table names; `out` is where [T, Hq, D] is written."""
    queries, layer = Queries(*asking), LayerArrays(*layer)
    group, shared = RowGroup(*rows), StepArrays(*shared)
    address, size, _ = out
    attend_rows(
        elements_at(queries.address, queries.size, layer.last_query),
        queries.distance,
        queries.tokens,
        layer.pages,
        group.slots,
        group.lengths,
        layer.scale,
        queries.num_heads,
        queries.num_kv_heads,
        shared.block_size,
        layer.head_size,
        layer.cos_sin,
        layer.sinks,
        layer.soft_cap,
        elements_at(address, size, layer.last_query),
    )
