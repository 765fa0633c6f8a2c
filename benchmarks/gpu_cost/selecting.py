"""What the kernels that select read, write and compute."""

from __future__ import annotations

import math
from math import ceil

import numpy as np

from benchmarks.gpu_cost.gpu import Cost, Gpu
from benchmarks.gpu_cost.prices import (
    INT32,
    STEP_CYCLES,
    Price,
    added,
    histogram_cycles,
    steps_of,
    stored,
    values,
    working_on,
)
from benchmarks.gpu_cost.recording import Launch
from benchmarks.gpu_cost.steps import Rows
from vllm_tokenselect.method.plan import Int64

EXPONENT_BITS = 8  # of a vote: the first digit


def query_bytes(launch: Launch) -> int:
    """Of a query and of the one that is stored."""
    own, last = launch["own_query"], launch["state_query"]
    return math.prod(own.shape[1:]) * (own.element_size() + last.element_size())


def decide(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    return Cost(l2_bytes=launch.grid[0] * query_bytes(launch), cycles=3 * STEP_CYCLES)


def mean_queries(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    out = launch["out"]
    num_heads, head_size = out.shape[1:]
    read = rows.queries.sum() * launch["query"].element_size()
    written = len(rows.queries) * out.element_size()
    steps = ceil(rows.queries.max() / launch["TOKENS"])
    traffic = float(read + written) * num_heads * head_size
    return Cost(l2_bytes=traffic, cycles=steps * STEP_CYCLES)


def candidates_of(launch: Launch) -> Int64:
    """Of the rows of a pass, int64 [R]."""
    return (values(launch["ends"]) - launch["start"]).clip(min=0)


def tiles_of(launch: Launch, own: Int64) -> Int64:
    """Keys that each tile reads of a KV head, int64 [tiles]."""
    tiles = values(launch["tiles"])
    return np.array([own[first : first + n].max(initial=0) for _, first, n in tiles])


def multiplied(launch: Launch, tiles: Int64) -> Cost:
    """Keys out of memory, once for each tile, and their products with all lines of a tile."""
    cache = launch["kv_cache"]
    keys = float(tiles.sum() * cache.shape[1] * launch["HEAD_SIZE"])
    lines = launch["LINES"] * launch["SPLITS"]
    return Cost(
        hbm_bytes=keys * cache.element_size(),
        tensor_flops=2 * keys * lines * launch["PRODUCTS"],
        working=launch.programs * np.count_nonzero(tiles) // len(tiles),
    )


def score(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own = candidates_of(launch)
    tiles = tiles_of(launch, own)
    steps = ceil(tiles.max() / launch["TOKENS"] / launch.grid[1])
    logits = 0 if launch["logits"] is None else 4.0 * own.sum() * launch["num_heads"]
    scoring = added(
        multiplied(launch, tiles),
        stored(logits, gpu, cycles=steps * STEP_CYCLES),
        Cost(exponentials=float(own.sum() * launch["num_heads"])),
    )
    if "own_query" not in launch.arguments:
        return scoring
    # Every program decides for its row.
    deciding = Cost(l2_bytes=launch.programs * query_bytes(launch), cycles=3 * STEP_CYCLES)
    return added(scoring, deciding)


def vote_tile(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    """Every program goes through the KV heads, with all queries of its tile and their parts' sums."""
    own, num_kv_heads = candidates_of(launch), launch["KV_HEADS"]
    tiles = tiles_of(launch, own)
    tokens = ceil(tiles.max() / launch["TOKENS"] / launch.grid[1])
    steps = num_kv_heads * ceil(launch["GROUP"] / launch["HEADS"])
    cost = multiplied(launch, tiles)
    lines = cost.working * launch["LINES"] * steps
    asked = 4.0 * lines * (launch["HEAD_SIZE"] + 2 * launch["PARTS"])
    # A program adds to the votes that it has written itself, which its multiprocessor may have kept.
    votes = (2 * steps - 1) * 4.0 * own.sum()
    return added(
        cost,
        Cost(
            l2_bytes=asked + votes,
            exponentials=float(own.sum() * num_kv_heads * launch["GROUP"]),
            cycles=steps * (1 + tokens) * STEP_CYCLES,
        ),
    )


def soft_vote(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own, heads = candidates_of(launch), launch["HEADS"]
    working = working_on(own, launch)
    counted = stored(4.0 * own.sum() * heads, gpu)
    # The largest score and the sum of every part, by each program.
    sums = 2 * 4.0 * working * heads * launch["PARTS"]
    # A program has one part of a row, and goes through the heads.
    steps = ceil(heads / launch["STEP"]) if own.any() else 0
    counting = parts_cycles(launch, own, EXPONENT_BITS)
    return Cost(
        hbm_bytes=counted.hbm_bytes,
        l2_bytes=counted.l2_bytes + sums + 4.0 * own.sum(),
        exponentials=float(own.sum() * heads),
        cycles=steps * STEP_CYCLES + counting,
        working=working,
    )


def selecting(launch: Launch) -> Int64:
    """Candidates of the rows that select, 0 of others, int64 [R]."""
    candidates = values(launch["candidate_ends"]) - launch["n_init"]
    return np.where(candidates > values(launch["top_k"]), candidates, 0)


def written_cost(launch: Launch, rows: Rows) -> Cost:
    """Of the lines of the table, but for rows that reuse: their context ends at 0."""
    writes = values(launch["context_ends"]) > 0
    tokens = np.where(writes, rows.lengths, 0)
    longest = tokens.max(initial=0) if not selecting(launch).any() else 0
    # A block number is read, a slot written, for each.
    traffic = 2.0 * INT32 * tokens.sum()
    steps, working = steps_of(longest, launch), working_on(tokens, launch)
    return Cost(l2_bytes=traffic, cycles=steps * STEP_CYCLES, working=working)


def parts_cycles(launch: Launch, own: Int64, bits: int) -> float:
    """Of counting the digits of a part, if there is one that selects."""
    return histogram_cycles(launch["TOKENS"], bits) if own.any() else 0.0


def digits_cost(launch: Launch, counts: str, gpu: Gpu) -> Cost:
    """Of a program that reads its part's votes and the counts of all parts of its row, of which it adds up
    `PARTS` at a time.
    """
    own = selecting(launch)
    parts = -(-own // launch["TOKENS"])
    line = launch[counts].shape[1] * launch[counts].element_size()
    steps = 1 + ceil(parts.max(initial=0) / launch["PARTS"])
    return added(
        stored(4.0 * own.sum(), gpu, cycles=steps * STEP_CYCLES, working=int(parts.sum())),
        Cost(l2_bytes=float((parts * parts).sum()) * line),
    )


def count_exponents(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    own = selecting(launch)
    counting = parts_cycles(launch, own, EXPONENT_BITS)
    return stored(4.0 * own.sum(), gpu, cycles=counting, working=working_on(own, launch))


def count_mantissas(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    counting = parts_cycles(launch, selecting(launch), launch["MANTISSA_BITS"])
    return added(digits_cost(launch, "exponents", gpu), Cost(cycles=counting))


def write_table(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    return added(digits_cost(launch, "mantissas", gpu), written_cost(launch, rows))


def write_finished(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    """Rows that reuse a selection are written too, and those that select also keep theirs."""
    kept = np.count_nonzero(selecting(launch))
    stored = INT32 * launch["selected_stride"]
    if "own_query" in launch.arguments:
        stored += query_bytes(launch)
    return added(write_table(launch, rows, gpu), Cost(l2_bytes=float(kept * stored)))


def finish(launch: Launch, rows: Rows, gpu: Gpu) -> Cost:
    chains = launch.grid[1] - 1
    # The stored selection is read, and the line or the selection written.
    traffic = 2.0 * INT32 * chains * launch["selected_stride"]
    return Cost(l2_bytes=traffic, cycles=3 * STEP_CYCLES)


PRICES: dict[str, Price] = {
    "_decide": decide,
    "_mean_queries": mean_queries,
    "score_tile": score,
    "_soft_vote": soft_vote,
    "vote_tile": vote_tile,
    "_count_exponents": count_exponents,
    "_count_mantissas": count_mantissas,
    "_write_table": write_table,
    "_write_finished": write_finished,
    "_finish": finish,
}
