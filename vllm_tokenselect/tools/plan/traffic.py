"""What a GPU reads from its KV cache and sends to other GPUs, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests, Int32
from vllm_tokenselect.tools.plan.layouts import Layout, Stage
from vllm_tokenselect.tools.plan.memory import GpuMemory, RankShape, step_limits
from vllm_tokenselect.tools.plan.models import ModelShape
from vllm_tokenselect.tools.plan.planned_server import PlannedServer

# vLLM hands hidden states and the residual from stage to stage.
HANDED_ON = 2
# Gathered keys and values are read, written, and read again.
GATHERED_TIMES = 3


@dataclass(frozen=True)
class AttendedTokens:
    """Tokens of a context that the method attends to.

    Attributes:
        decoding: attended to by a token at the context's end that selects.
        reusing: the most attended to by a token that reuses a selection.
        candidates: number of keys that are scored for a token; 0 when it attends to everything.
        prompt: attended tokens of a prompt of that length, as a share of full attention's.
        prompt_rows: candidates of each selecting row of the prompt, its tail's single queries last.
        chunk: candidates of the prompt's last chunk; None when it does not select.
    """

    context: int
    decoding: int
    reusing: int
    candidates: int
    prompt: float
    prompt_rows: tuple[int, ...]
    chunk: int | None

    @classmethod
    def of(cls, server: PlannedServer) -> AttendedTokens:
        """Read from the plans of a decoding step and of a prompt of the longest context."""
        method, context = server.config.method, server.context
        step = _plan(server, context - 1, context, context - 1)
        prompt = _plan(server, 0, context, context)
        attended, full = prompt.num_attended(method), prompt.num_in_context()
        decoding = int(step.num_attended(method)[0])
        rows = prompt.candidate_end - method.n_init
        chunks = rows[~prompt.dense & (prompt.query_len > 1)]
        dense = bool(step.dense[0])
        reuses = method.reuses_selections and not dense
        return cls(
            context=context,
            decoding=decoding,
            reusing=min(decoding + method.refresh_interval, context) if reuses else decoding,
            candidates=0 if dense else int(step.candidate_end[0]) - method.n_init,
            prompt=float(attended.sum() / full.sum()),
            prompt_rows=tuple(map(int, rows[~prompt.dense])),
            chunk=int(chunks[-1]) if len(chunks) else None,
        )


@dataclass(frozen=True)
class Reads:
    """Bytes that attention reads from a GPU's memory for one generated token at the context's end.

    Attributes:
        full: with full attention.
        selecting: for a token that selects: all keys and the scores (written and read) in anchors, the
            selected tokens, and what dense layers read.
        reusing: the most for a token that reuses a selection.
    """

    full: int
    selecting: int
    reusing: int


@dataclass(frozen=True)
class Network:
    """Bytes that a GPU sends to others.

    Attributes:
        activations: all-reduces of tensor parallelism, two a layer, and one of the embedding.
        logits: their all-gather.
        pipeline: hidden states for the next stage.
        votes, queries: of `vote: "global"`, in every layer that selects; of a generated token in anchors.
        collectives: how often GPUs wait for each other.
    """

    activations: int
    logits: int
    pipeline: int
    votes: int
    queries: int
    collectives: int

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.pipeline + self.votes + self.queries


@dataclass(frozen=True)
class Traffic:
    """Traffic of one GPU.

    Attributes:
        decoding: sent for one generated token.
        chunk: sent for the last chunk of a prompt that fills the context.
        prompt: sent for all of that prompt.
    """

    reads: Reads
    decoding: Network
    chunk: Network
    prompt: Network


def traffic(
    model: ModelShape,
    server: PlannedServer,
    layout: Layout,
    stage: Stage,
    memory: GpuMemory,
    attended: AttendedTokens,
) -> Traffic:
    """Traffic of a GPU of a stage."""
    limits = step_limits(server, RankShape.of(model, layout.tp))
    chunk = min(server.config.method.query_chunk, server.context)
    method = server.config.method

    def widths(rows: Iterable[int]) -> list[int]:
        return [limits.width_of(row + method.n_init) for row in rows]

    def sent(tokens: int, vote_widths: list[int], decoding: bool) -> Network:
        return _network(model, server, layout, stage, tokens, vote_widths, decoding)

    return Traffic(
        reads=_reads(server, stage, memory, attended, limits.row_bytes(attended.candidates)),
        # A CUDA graph is captured for the longest context that there may be.
        decoding=sent(1, [limits.max_width], decoding=True),
        chunk=sent(chunk, widths([attended.chunk] if attended.chunk else []), decoding=False),
        prompt=sent(server.context, widths(attended.prompt_rows), decoding=False),
    )


def _plan(server: PlannedServer, start: int, end: int, prompt: int) -> SelectionPlan:
    def one(number: int) -> Int32:
        return np.array([number], np.int32)

    request = BatchRequests(one(0), one(1), one(prompt), one(server.config.top_k))
    starts = np.array([0, end - start], np.int32)
    return SelectionPlan.build(starts, one(end), request, server.config.method)


def _reads(
    server: PlannedServer,
    stage: Stage,
    memory: GpuMemory,
    attended: AttendedTokens,
    score_bytes: int,
) -> Reads:
    times = 1 if server.decodes_in_place else GATHERED_TIMES
    # A stage may have no layer with full attention.
    selecting = memory.kv_token * stage.selecting // max(stage.full_attention, 1)
    # Only anchors score keys.
    keys = attended.candidates * selecting * stage.anchors // max(stage.selecting, 1) // 2
    scores = 2 * score_bytes * stage.anchors
    dense = attended.context * (memory.kv_token - selecting)
    return Reads(
        full=attended.context * memory.kv_token,
        selecting=keys + scores + times * attended.decoding * selecting + dense,
        reusing=times * attended.reusing * selecting + dense,
    )


def _network(
    model: ModelShape,
    server: PlannedServer,
    layout: Layout,
    stage: Stage,
    tokens: int,
    vote_widths: list[int],
    decoding: bool,
) -> Network:
    """What a GPU sends for `tokens` tokens, one of which makes logits; GPUs form rings.

    Args:
        vote_widths: votes of each row that selects.
        decoding: whether the rows are generated tokens, which select in anchors alone and may reuse.
    """
    tp, itemsize = layout.tp, server.dtype.itemsize
    hidden = tokens * model.hidden_size * itemsize
    gathered = (tp - 1) / tp  # sent in an all-gather, of what everybody has in the end
    reduced = 2 * gathered  # sent in an all-reduce
    all_reduces = 2 * len(stage.layers) + stage.first
    votes_together = server.config.vote == "global" and tp > 1 and bool(vote_widths)
    layers = (stage.anchors if decoding else stage.selecting) if votes_together else 0
    compares = layers if decoding and server.config.method.reuses_selections else 0
    query = model.num_heads * model.head_size * itemsize
    # A stage's GPUs send their parts, and put them together in the next.
    handed = HANDED_ON * hidden * ((not stage.last) / tp + (not stage.first) * gathered)
    waits = (all_reduces + stage.last + layers + compares + (not stage.first)) * (tp > 1)
    return Network(
        activations=int(all_reduces * reduced * hidden),
        logits=int(stage.last * gathered * model.vocab_size * itemsize),
        pipeline=int(handed),
        votes=int(layers * reduced * 4 * sum(vote_widths)),
        queries=int(compares * gathered * query),
        collectives=waits + (not stage.last),
    )
