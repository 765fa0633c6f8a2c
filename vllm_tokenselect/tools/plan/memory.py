"""What a GPU holds: the buffers that a server allocates, allocated on the device `meta`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from vllm_tokenselect.gpu.attention import GatherBuffer
from vllm_tokenselect.gpu.decoding_attention import make_scratch
from vllm_tokenselect.gpu.graph_size import largest_graph
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.tools.plan.layouts import Layout, Stage
from vllm_tokenselect.tools.plan.models import ModelShape
from vllm_tokenselect.tools.plan.planned_server import BLOCK_SIZE, PlannedServer

META = torch.device("meta")


@dataclass(frozen=True)
class RankShape:
    """Heads of one GPU. With more GPUs than KV heads, each KV head is on several."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @classmethod
    def of(cls, model: ModelShape, tp: int) -> RankShape:
        return cls(model.num_heads // tp, max(model.num_kv_heads // tp, 1), model.head_size)


@dataclass(frozen=True)
class Buffers:
    """Bytes that a GPU holds in addition to its KV cache.

    Attributes:
        weights: of its share of the stage.
        selection_cache: of the stage's layers, a line for each of `max_num_seqs` requests.
        workspace: scores, votes and mean queries of a group of rows, shared by the layers.
        sparse_block_table: of a group of rows, shared by the layers.
        gather_buffer: keys and values of a few rows; 0 if a library reads them in the cache.
        partial_outputs: of the own attention; 0 where a library attends all rows.
        block_tables: vLLM's, two of `max_num_seqs` times the longest context.
        activations: of the largest step, or of its logits. A guess.
        reserve: for CUDA, NCCL and CUDA graphs. A guess.
    """

    weights: int
    selection_cache: int
    workspace: int
    sparse_block_table: int
    gather_buffer: int
    partial_outputs: int
    block_tables: int
    activations: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU of a stage, bytes.

    Attributes:
        usable: what vLLM may use.
        buffers: all but the KV cache.
        kv_token: KV cache of one token in the layers with full attention, on TOKENSELECT or dense.
        kv_context: KV cache of one context in all layers.
    """

    usable: int
    buffers: Buffers
    kv_token: int
    kv_context: int

    @property
    def left(self) -> int:
        """Bytes left for the KV cache; negative when not even the buffers fit."""
        return self.usable - self.buffers.total

    @property
    def missing(self) -> int:
        """Bytes that one context lacks; 0 if it fits."""
        return max(self.kv_context - self.left, 0)

    def num_contexts(self, max_num_seqs: int) -> int:
        """Contexts of full length at a time."""
        return min(max(self.left, 0) // self.kv_context, max_num_seqs)


def step_limits(server: PlannedServer, rank: RankShape) -> StepLimits:
    """The limits by which the server's buffers are sized.

    Raises:
        SettingsError: when the setting `workspace_mb` is too small for the context.
    """
    limits = StepLimits(
        method=server.config.method,
        num_heads=rank.num_heads,
        num_kv_heads=rank.num_kv_heads,
        max_model_len=server.context,
        workspace_bytes=server.config.workspace_bytes("cuda"),
        # If attention reads the cache itself, a request may ask for full attention over its whole context.
        full_attention=server.attends_in_place,
        max_tokens=server.max_num_batched_tokens,
    )
    return replace(limits, graph_rows=largest_graph(limits, server.max_num_seqs))


def gpu_memory(model: ModelShape, server: PlannedServer, layout: Layout, stage: Stage) -> GpuMemory:
    """Memory of each GPU of a stage.

    Raises:
        SettingsError: when the setting `workspace_mb` is too small for the context.
    """
    rank = RankShape.of(model, layout.tp)
    page = kv_page_bytes(rank, server.kv_dtype)
    pages = sum(_pages(server, layer.window) for layer in stage.layers)
    return GpuMemory(
        usable=server.usable,
        buffers=_buffers(model, server, layout, stage, rank),
        kv_token=stage.full_attention * page // BLOCK_SIZE,
        kv_context=pages * page,
    )


def kv_page_bytes(rank: RankShape, dtype: torch.dtype) -> int:
    """Keys and values of a block of tokens in one layer."""
    shape = (1, rank.num_kv_heads, 2, BLOCK_SIZE, rank.head_size)
    return torch.empty(shape, dtype=dtype, device=META).nbytes


def _pages(server: PlannedServer, window: int | None) -> int:
    """Blocks of one context in a layer."""
    if window is None:
        return -(-server.context // BLOCK_SIZE)
    tokens = min(window - 1 + server.max_num_batched_tokens, server.context)
    return -(-tokens // BLOCK_SIZE) + 1  # a window may start in the middle of a block


def _buffers(
    model: ModelShape, server: PlannedServer, layout: Layout, stage: Stage, rank: RankShape
) -> Buffers:
    limits = step_limits(server, rank)
    workspace = Workspace(limits, rank.head_size, META, dtype=server.dtype)
    table = workspace.table_bytes
    return Buffers(
        weights=_weights(model, server, layout, stage),
        selection_cache=_selection_cache(server, layout, stage, rank),
        workspace=workspace.num_bytes - table,
        sparse_block_table=table,
        gather_buffer=0 if server.attends_in_place else _gather_buffer(server, rank, limits),
        partial_outputs=_partial_outputs(server, rank, limits),
        block_tables=2 * 4 * server.max_num_seqs * _pages(server, None),
        activations=_activations(model, server, layout, stage),
        reserve=server.reserve,
    )


def _weights(model: ModelShape, server: PlannedServer, layout: Layout, stage: Stage) -> int:
    tp, wide = layout.tp, server.dtype.itemsize
    # Keys and values are divided among as many GPUs as there are KV heads, and no further.
    copies = max(tp // model.num_kv_heads, 1)
    matrices = sum(layer.matrices + (copies - 1) * model.kv_matrices for layer in stage.layers)
    # A tied embedding lies in the first stage and in the last, once where they are the same.
    ends = model.embedding * (stage.first or (stage.last and not model.head))
    ends += model.head * stage.last
    vectors = sum(layer.vectors for layer in stage.layers) + model.final * stage.last
    return int(matrices / tp * server.weight_bytes) + ends // tp * wide + vectors * wide


def _selection_cache(server: PlannedServer, layout: Layout, stage: Stage, rank: RankShape) -> int:
    method = server.config.method
    # Ranks that vote together keep the queries of all of them.
    ranks = layout.tp if method.vote == "global" else 1
    if not method.reuses_selections:
        return 0
    layer = SelectionCacheState.allocate(
        server.max_num_seqs,
        method.selection_size,
        ranks * rank.num_heads,
        rank.head_size,
        server.dtype,
        META,
    )
    return stage.anchors * layer.num_bytes


def _gather_buffer(server: PlannedServer, rank: RankShape, limits: StepLimits) -> int:
    buffer = GatherBuffer(rank.num_kv_heads, rank.head_size, server.dtype, limits.table_width, META)
    size: int = buffer.keys.nbytes + buffer.values.nbytes
    return size


def _partial_outputs(server: PlannedServer, rank: RankShape, limits: StepLimits) -> int:
    if server.config.attention != "auto":
        return 0
    return make_scratch(limits, rank.head_size, META).num_bytes


def _activations(model: ModelShape, server: PlannedServer, layout: Layout, stage: Stage) -> int:
    """Both halves of an MLP and four hidden states of a step, or logits in fp32 and a copy of them."""
    widths = 4 * model.hidden_size + 3 * model.mlp_width // layout.tp
    step = server.max_num_batched_tokens * widths * server.dtype.itemsize
    logits = 2 * 4 * server.max_num_seqs * model.vocab_size
    return max(step, logits if stage.last else 0)
