"""Which rows reuse their request's last selection: decided on the GPU, before anything is scored.

Where every request has one row, the programs that score a row decide for themselves (`decide_row`): each
reads the row's query and the one that is stored, and the first of them writes what was decided. What is
stored then stays as it is until the table is written. Otherwise `decide_rows` is a launch of its own. All
kernels ask `_resembles`, with as many warps, and add up in one order: a row is decided in the same way
whichever of them decides.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from vllm_tokenselect.kernels.gpu_launch import warps_of_row
from vllm_tokenselect.kernels.selection_cache import state as cache_state
from vllm_tokenselect.kernels.selection_cache.gpu_rows import (
    END_ARRAYS,
    NUMBERS,
    ROW_ARRAYS,
    RowArrays,
)
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState

ELEMENTS_AT_ONCE = (
    2048  # of a query and of the one that is stored; more would not fit the registers
)
SELECTS = tl.constexpr(cache_state.SELECTS)


@dataclass(frozen=True)
class Decision:
    """What decides whether rows reuse a selection.

    Attributes:
        query: [T, Hq, D] in the dtype of the state's, the last dimension contiguous.
        query_start: int32 [R], the query of each row.
        num_kv_heads: Hkv.
        rows: `scored_end`, `table_end` and `reused_end` of the rows of chains are written.
        n_init: length of the sink.
        threshold: least cosine.
        refresh_interval: most tokens that may have left the local window.
        state: of the layer.
    """

    query: torch.Tensor
    query_start: torch.Tensor
    num_kv_heads: int
    rows: RowArrays
    n_init: int
    threshold: float
    refresh_interval: int
    state: SelectionCacheState

    @cached_property
    def arguments(self) -> dict[str, object]:
        """What the kernels that decide take, but for the sink's length."""
        num_heads, head_size = self.query.shape[1:]
        group_size = num_heads * head_size // self.num_kv_heads
        padded_size = triton.next_power_of_2(group_size)
        heads_at_once = max(ELEMENTS_AT_ONCE // padded_size, 1)
        return {
            "own_query": self.query,
            "own_start": self.query_start,
            "cached_seats": self.rows.cached_seat,
            "owners": self.rows.owner,
            "top_k": self.rows.top_k,
            "candidate_ends": self.rows.candidate_end,
            "context_ends": self.rows.context_end,
            "state_query": self.state.query,
            "state_end": self.state.candidate_end,
            "state_owner": self.state.owner,
            "table_ends": self.rows.table_end,
            "reused_ends": self.rows.reused_end,
            "threshold": self.threshold,
            "refresh_interval": self.refresh_interval,
            "own_stride": self.query.stride(0),
            "own_head_stride": self.query.stride(1),
            "KV_HEADS": self.num_kv_heads,
            "GROUP_SIZE": group_size,
            "PADDED_GROUP": padded_size,
            "HEADS_AT_ONCE": min(triton.next_power_of_2(self.num_kv_heads), heads_at_once),
        }


def decide_rows(decision: Decision) -> None:
    """As `reference.decide`; writes what the scores and the table have to do for each row of a chain."""
    rows, (_, num_heads, head_size) = decision.rows, decision.query.shape
    if not len(rows.chains):
        return
    _decide[(len(rows.chains),)](
        chains=rows.chains,
        scored_ends=rows.scored_end,
        n_init=decision.n_init,
        HEAD_SIZE=head_size,
        **decision.arguments,
        num_warps=warps_of_row(num_heads, decision.num_kv_heads, head_size),
    )


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROW_ARRAYS + END_ARRAYS)
def _decide(
    chains,
    own_query,
    own_start,
    cached_seats,
    owners,
    top_k,
    candidate_ends,
    context_ends,
    state_query,
    state_end,
    state_owner,
    scored_ends,
    table_ends,
    reused_ends,
    threshold,
    refresh_interval,
    n_init,
    own_stride,
    own_head_stride,
    HEAD_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """The rows of a chain, one after the other: as `reference.decide`."""
    chain = chains + tl.program_id(0) * 2
    first = tl.load(chain).to(tl.int64)
    num_rows = tl.load(chain + 1)
    if num_rows == 0:
        return
    seat = tl.load(cached_seats + first).to(tl.int64)
    owner = tl.load(owners + first)
    stored = state_query + seat * KV_HEADS * GROUP_SIZE
    last, last_stride = stored, HEAD_SIZE
    last_end = tl.load(state_end + seat)
    known = tl.load(state_owner + seat) == owner
    changed = False
    for following in range(0, num_rows):
        row = first + following
        own = own_query + tl.load(own_start + row).to(tl.int64) * own_stride
        candidate_end = tl.load(candidate_ends + row)
        sparse = candidate_end - n_init > tl.load(top_k + row)
        recent = known & (candidate_end - last_end <= refresh_interval)
        similar = _resembles(
            own,
            own_head_stride,
            last,
            last_stride,
            threshold,
            HEAD_SIZE,
            KV_HEADS,
            GROUP_SIZE,
            PADDED_GROUP,
            HEADS_AT_ONCE,
        )
        reuses = sparse & recent & similar
        selects = sparse & (reuses == 0)
        tl.store(scored_ends + row, tl.where(selects, candidate_end, n_init))
        tl.store(table_ends + row, tl.where(reuses, 0, tl.load(context_ends + row)))
        tl.store(reused_ends + row, tl.where(reuses, last_end, SELECTS))
        if selects:
            last, last_stride = own, own_head_stride
            last_end, known, changed = candidate_end, True, True
    if changed:
        remember_query(last, last_stride, stored, 0, 1, HEAD_SIZE, KV_HEADS * GROUP_SIZE)
        tl.store(state_end + seat, last_end)
        tl.store(state_owner + seat, owner)


@triton.jit
def decide_row(
    row,
    seat,
    writes,
    own_query,
    own_start,
    owners,
    top_k,
    candidate_ends,
    context_ends,
    state_query,
    state_end,
    state_owner,
    scored_ends,
    table_ends,
    reused_ends,
    threshold,
    refresh_interval,
    n_init,
    own_stride,
    own_head_stride,
    HEAD_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """Decide for a row that is alone in its chain, as `_decide`; what is stored stays as it is.

    Args:
        writes: whether this program writes what was decided.

    Returns:
        Where the candidates end that are scored.
    """
    own = own_query + tl.load(own_start + row).to(tl.int64) * own_stride
    candidate_end, last_end = tl.load(candidate_ends + row), tl.load(state_end + seat)
    sparse = candidate_end - n_init > tl.load(top_k + row)
    known = tl.load(state_owner + seat) == tl.load(owners + row)
    recent = known & (candidate_end - last_end <= refresh_interval)
    similar = _resembles(
        own,
        own_head_stride,
        state_query + seat * KV_HEADS * GROUP_SIZE,
        HEAD_SIZE,
        threshold,
        HEAD_SIZE,
        KV_HEADS,
        GROUP_SIZE,
        PADDED_GROUP,
        HEADS_AT_ONCE,
    )
    reuses = sparse & recent & similar
    scored_end = tl.where(sparse & (reuses == 0), candidate_end, n_init)
    if writes:
        tl.store(scored_ends + row, scored_end)
        tl.store(table_ends + row, tl.where(reuses, 0, tl.load(context_ends + row)))
        tl.store(reused_ends + row, tl.where(reuses, last_end, SELECTS))
    return scored_end


@triton.jit
def _resembles(
    own,
    own_stride,
    last,
    last_stride,
    threshold,
    HEAD_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """Whether `q . l >= threshold |q| |l|` in every KV head, heads that share one as one vector.

    Args:
        own, last: queries [Hq, D], of heads that lie so many elements apart.
    """
    group, in_group = tl.arange(0, HEADS_AT_ONCE)[:, None], tl.arange(0, PADDED_GROUP)[None, :]
    different = 0
    for first in tl.static_range(0, KV_HEADS, HEADS_AT_ONCE):
        is_element = (first + group < KV_HEADS) & (in_group < GROUP_SIZE)
        element = (first + group) * GROUP_SIZE + in_group
        head, in_head = element // HEAD_SIZE, element % HEAD_SIZE
        # [HEADS_AT_ONCE, PADDED_GROUP]
        q = tl.load(own + head * own_stride + in_head, is_element, 0.0).to(tl.float32)
        s = tl.load(last + head * last_stride + in_head, is_element, 0.0).to(tl.float32)
        least = threshold * tl.sqrt(tl.sum(q * q, 1)) * tl.sqrt(tl.sum(s * s, 1))
        resembles = tl.sum(q * s, 1) >= least  # never where there is a NaN
        different += tl.sum((resembles == 0).to(tl.int32), 0)
    return different == 0


@triton.jit
def remember_query(
    own, own_stride, stored, share, shares, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr
):
    """Copy one of so many shares of a query of `SIZE` elements to where it is stored."""
    for first in range(share * 1024, SIZE, shares * 1024):
        element = first + tl.arange(0, 1024)
        # [1024]
        value = tl.load(
            own + element // HEAD_SIZE * own_stride + element % HEAD_SIZE, element < SIZE
        )
        tl.store(stored + element, value, element < SIZE)
