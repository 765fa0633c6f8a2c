"""Steps of a server, planned and cut as it does, and the launches of one of their layers.

What is large lies on PyTorch's device `meta`, where tensors have shapes and no memory. What the host
knows of the rows has its values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from benchmarks.attention.cases import BLOCK_SIZE, PREFILL_QUERIES, Work
from benchmarks.gpu_cost.recording import Launch, recording
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.gpu.cutting import row_columns
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention, make_scratch
from vllm_tokenselect.gpu.flash_attention import PagedFlashAttention
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.rows import RowGroup, graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.plan import Int64, SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method

META, CPU = torch.device("meta"), torch.device("cpu")
MAX_SEQS = 512  # of the server; it bounds what a CUDA graph replays
SHARED_BY = 4  # one layer in four selects, where a layer follows

Role = Literal["reselecting", "reusing", "following", "dense"]
ROLES: tuple[Role, ...] = ("reselecting", "reusing", "following", "dense")


@dataclass(frozen=True)
class Case:
    """A layer in a step.

    Attributes:
        work: what the step does.
        role: what all of its rows do in this layer: select anew, reuse what the Selection Cache has, follow
            an anchor layer, or see their whole context since their requests ask for it.
        captured: whether the step is one that a CUDA graph replays.
        max_model_len: longest context of the server.
        method: its settings.
    """

    work: Work
    role: Role
    captured: bool
    max_model_len: int
    method: Method

    @property
    def limits(self) -> StepLimits:
        shape = self.work.shape
        return StepLimits(
            self.method,
            shape.num_heads,
            shape.num_kv_heads,
            self.max_model_len,
            TokenSelectConfig().workspace_bytes("cuda"),
            full_attention=True,
            max_tokens=PREFILL_QUERIES,
            graph_rows=MAX_SEQS,
        )


class Rows(NamedTuple):
    """What the rows of a group do.

    Attributes:
        role: of all of them.
        queries: int64 [R].
        candidates: int64 [R], keys that are scored; 0 of a row that does not select.
        lengths: int64 [R], tokens that the last query attends to.
    """

    role: Role
    queries: Int64
    candidates: Int64
    lengths: Int64


class GroupLaunches(NamedTuple):
    """What a layer launches for a group of rows."""

    rows: Rows
    launches: list[Launch]


def method_of(role: Role, settings: Method) -> Method:
    """The settings of a server with layers of this role."""
    method = settings.for_blocks(BLOCK_SIZE)
    return replace(method, anchor_layers=SHARED_BY) if role == "following" else method


def record_layer(case: Case, multiprocessors: int) -> list[GroupLaunches]:
    """The launches of a layer, group by group."""
    work, limits = case.work, case.limits
    shape, plan = work.shape, plan_of(case)
    groups = groups_of(case, plan, limits)
    if case.role == "reusing":
        let_rows_reuse(groups, case.method)
    cache = cache_of(case)
    workspace = Workspace(limits, shape.head_size, META, dtype=torch.bfloat16)
    tokens = work.batch * work.queries
    heads = shape.num_heads + 2 * shape.num_kv_heads
    # As a model hands it over: a view.
    query = torch.empty(tokens, heads, shape.head_size, dtype=torch.bfloat16, device=META)
    query = query[:, : shape.num_heads]
    out = torch.empty(query.shape, dtype=query.dtype, device=META)
    blocks = -(-case.max_model_len // BLOCK_SIZE)
    block_table = torch.empty((work.batch, blocks), dtype=torch.int32, device=META)
    scratch = make_scratch(limits, shape.head_size, META)
    recorded = []
    for group in groups:
        step = GpuStep([group], block_table)
        with recording(multiprocessors) as recorder:
            library = PagedFlashAttention(recorder.flash_attention)
            attention = DecodingAttention(library, scratch)
            step.run_layer(query, cache, shape.scale, workspace, attention, out)
        rows = rows_of(case, plan, group)
        recorded.append(GroupLaunches(rows, recorder.launches))
    return recorded


def plan_of(case: Case) -> SelectionPlan:
    work, batch = case.work, case.work.batch
    first = work.context - work.queries
    # Tokens that are generated; or chunks in the middle of a prompt, without its tail.
    prompt = first if work.queries == 1 else work.context + case.method.tail_queries
    top_k = FULL_ATTENTION if case.role == "dense" else case.method.top_k
    return SelectionPlan.build(
        np.arange(batch + 1, dtype=np.int32) * np.int32(work.queries),
        np.full(batch, work.context, np.int32),
        BatchRequests(
            seats=np.arange(batch, dtype=np.int32),
            owners=np.arange(1, batch + 1, dtype=np.int32),
            prompt_lens=np.full(batch, prompt, np.int32),
            top_k=np.full(batch, top_k, np.int32),
        ),
        case.method,
    )


def groups_of(case: Case, plan: SelectionPlan, limits: StepLimits) -> list[RowGroup]:
    seq_lens = np.full(case.work.batch, case.work.context, np.int32)
    device_lens = torch.from_numpy(seq_lens)
    # The scheduler keeps steps whose graph is replayed to contexts that fit at once.
    if not case.captured or row_columns(plan, limits).sum() > limits.score_columns:
        return step_rows(plan, seq_lens, device_lens, limits)
    tokens = case.work.batch * case.work.queries
    buffers = RowBuffers(tokens, CPU)
    return graph_rows(plan, seq_lens, device_lens, limits, buffers, tokens, case.work.queries)


def let_rows_reuse(groups: list[RowGroup], method: Method) -> None:
    """What `decide_rows` writes for rows whose selections are as old as they may be."""
    for group in groups:
        group.scored_end.fill_(method.n_init)
        group.table_end.zero_()
        group.reused_end.copy_(group.candidate_end - method.refresh_interval)


def cache_of(case: Case) -> LayerCache:
    """The layer's part of a KV cache that holds the step's contexts, without its contents."""
    work, shape, follows = case.work, case.work.shape, case.role == "following"
    blocks = work.batch * -(-work.context // BLOCK_SIZE)
    pages = (blocks, BLOCK_SIZE, shape.num_kv_heads, 2, shape.head_size)
    selections = None
    if case.method.reuses_selections and not follows:
        selections = SelectionCacheState.allocate(
            MAX_SEQS,
            case.method.selection_size,
            shape.num_heads,
            shape.head_size,
            torch.bfloat16,
            META,
        )
    return LayerCache(
        torch.empty(pages, dtype=torch.bfloat16, device=META).permute(0, 2, 3, 1, 4),
        selections=selections,
        follows=follows,
    )


def rows_of(case: Case, plan: SelectionPlan, group: RowGroup) -> Rows:
    rows = slice(group.first, group.first + group.num_rows)
    method, dense = case.method, plan.dense[rows]
    lengths = plan.lengths(method)[rows].astype(np.int64)
    if case.role == "reusing":
        lengths = np.where(dense, lengths, lengths + method.refresh_interval)
    selects = ~dense if case.role == "reselecting" else np.zeros_like(dense)
    candidates = np.where(selects, plan.candidate_end[rows] - method.n_init, 0)
    return Rows(
        case.role, plan.query_len[rows].astype(np.int64), candidates.astype(np.int64), lengths
    )
