"""What `benchmarks.attention` measures: shapes, steps, and TokenSelect's layer for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vllm_tokenselect.gpu.attention import GatherBuffer, RowAttention
from vllm_tokenselect.gpu.decoding_attention import DecodingAttention, make_scratch
from vllm_tokenselect.gpu.flash_attention import PagedFlashAttention
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.gpu.masked_attention import SdpaAttention
from vllm_tokenselect.gpu.rows import RowGroup, graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.gpu.workspace import Workspace
from vllm_tokenselect.kernels.layer_cache import LayerCache
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests
from vllm_tokenselect.method.settings import Method

BLOCK_SIZE = 16  # vLLM's default on NVIDIA GPUs
PREFILL_QUERIES = 8192


@dataclass(frozen=True)
class Shape:
    """Attention of a model's layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def token_bytes(self) -> int:
        """Keys, or values, of one token in bf16."""
        return 2 * self.num_kv_heads * self.head_size

    @property
    def scale(self) -> float:
        return self.head_size**-0.5


SHAPES = (
    Shape("Qwen2-7B", 28, 4, 128),
    Shape("Llama-3.1-8B", 32, 8, 128),
    Shape("Qwen3-32B", 64, 8, 128),
)


@dataclass(frozen=True)
class Work:
    """One step: decoding of a batch, or one request's prefill step in the middle of its prompt."""

    shape: Shape
    context: int
    batch: int
    queries: int

    @property
    def name(self) -> str:
        return f"prefill {self.queries}" if self.queries > 1 else f"decode {self.batch}"

    @property
    def full_bytes(self) -> float:
        """What full attention must read: every key and value once."""
        return 2.0 * self.batch * self.context * self.shape.token_bytes

    @property
    def full_flops(self) -> float:
        seen = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) / 2
        return 4.0 * self.batch * seen * self.shape.num_heads * self.shape.head_size


class Data:
    """A layer's tensors, so many of them that none stays in the L2 cache.

    Args:
        work: the step.
        device: where they lie.
        max_bytes: of the cache; requests share blocks beyond it, each in an order of its own.
    """

    def __init__(self, work: Work, device: torch.device, max_bytes: int) -> None:
        self.work, shape = work, work.shape
        generator = torch.Generator(device).manual_seed(0)
        per_request = -(-work.context // BLOCK_SIZE)
        most_blocks = max_bytes // (2 * shape.token_bytes * BLOCK_SIZE)
        self.copies = max(1, min(4, most_blocks // (work.batch * per_request)))
        wanted = self.copies * work.batch * per_request
        num_blocks = max(min(wanted, most_blocks), per_request)
        cache_shape = (num_blocks, BLOCK_SIZE, shape.num_kv_heads, 2 * shape.head_size)
        self.pages = torch.empty(cache_shape, dtype=torch.bfloat16, device=device)
        for blocks in self.pages.split(max(num_blocks // 16, 1)):  # random in parts: memory
            blocks.normal_(generator=generator)
        shuffled = [
            torch.randperm(num_blocks, device=device, generator=generator)
            for _ in range(-(-wanted // num_blocks))
        ]
        tables = torch.cat(shuffled)[:wanted].to(torch.int32)
        self.block_tables = tables.view(self.copies, work.batch, per_request)
        tokens = work.batch * work.queries
        self.query = torch.randn(
            (tokens, shape.num_heads, shape.head_size), device=device, generator=generator
        ).to(torch.bfloat16)
        self.out = torch.empty_like(self.query)
        self.seq_lens = torch.full((work.batch,), work.context, dtype=torch.int32, device=device)

    def block_table(self, turn: int) -> torch.Tensor:
        return self.block_tables[turn % self.copies]


class TokenSelectLayer:
    """One layer of TokenSelect over the data, whole and stage by stage.

    Args:
        data: of the step.
        method: the settings.
        workspace_bytes: for the scores.
        varlen: FlashAttention 3 for rows of prompts, or None for PyTorch's SDPA over gathered tokens.
    """

    def __init__(
        self,
        data: Data,
        method: Method,
        varlen: Callable[..., object] | None,
        workspace_bytes: int = 512 << 20,
    ) -> None:
        work, shape, device = data.work, data.work.shape, data.query.device
        limits = StepLimits(
            method, shape.num_heads, shape.num_kv_heads, work.context, workspace_bytes
        )
        self.data, self.method = data, method
        self.workspace = Workspace(limits, shape.head_size, device)
        library: RowAttention
        if varlen is not None:
            library = PagedFlashAttention(varlen)
        else:
            library = SdpaAttention(
                GatherBuffer(
                    shape.num_kv_heads,
                    shape.head_size,
                    torch.bfloat16,
                    method.max_attended,
                    device,
                )
            )
        self.attention: RowAttention = DecodingAttention(
            library, make_scratch(limits, shape.head_size, device)
        )
        self.cache = LayerCache(
            data.pages.unflatten(-1, (2, shape.head_size)).permute(0, 2, 3, 1, 4)
        )
        self.seq_lens = np.full(work.batch, work.context, np.int32)
        # A prefill step lies before the prompt's tail; whatever is decoded lies behind it.
        prompt_len = 1 if work.queries == 1 else work.context + method.tail_queries
        self.plan = SelectionPlan.build(
            np.arange(work.batch + 1, dtype=np.int32) * work.queries,
            self.seq_lens,
            BatchRequests.without_seats(np.full(work.batch, prompt_len, np.int32), method.top_k),
            method,
        )
        self.limits, self.buffers = limits, RowBuffers(work.batch, device)
        groups = self.write_rows()
        self.steps = [GpuStep(groups, table) for table in data.block_tables]

    def write_rows(self) -> list[RowGroup]:
        """What a metadata builder does for the step: a decoding one into persistent buffers."""
        device_lens, batch = self.data.seq_lens, self.data.work.batch
        if self.data.work.queries > 1:
            return step_rows(self.plan, self.seq_lens, device_lens, self.limits)
        return graph_rows(
            self.plan, self.seq_lens, device_lens, self.limits, self.buffers, batch, 1
        )

    def run(self, turn: int) -> None:
        """A layer whose rows all select."""
        self._step(turn).run_layer(
            self.data.query,
            self.cache,
            self.data.work.shape.scale,
            self.workspace,
            self.attention,
            self.data.out,
        )

    def stages(self) -> dict[str, Callable[[int], None]]:
        """Each stage alone; `attend` is what a row that reuses its selection takes."""
        names = ("score", "vote", "select", "attend")
        return {name: partial(self._stage, name) for name in names}

    def _stage(self, name: str, turn: int) -> None:
        step, scale = self._step(turn), self.data.work.shape.scale
        for group in step.groups:
            if name == "score":
                step.score(group, self.data.query, self.cache, scale, self.workspace)
            elif name == "vote":
                step.vote(group, self.cache, scale, self.workspace)
            elif name == "select":
                step.build_table(group, self.cache, self.workspace)
            elif name == "attend":
                step.attend(
                    group,
                    self.data.query,
                    self.cache,
                    scale,
                    self.workspace,
                    self.attention,
                    self.data.out,
                )

    def _step(self, turn: int) -> GpuStep:
        return self.steps[turn % len(self.steps)]

    @property
    def score_bytes(self) -> float:
        """Keys that the scores must read: every request's candidates once."""
        candidates = self.plan.candidate_end - self.method.n_init
        furthest = [
            max(candidates[(self.plan.row_seq == seq) & ~self.plan.dense], default=0)
            for seq in range(self.data.work.batch)
        ]
        return float(sum(furthest)) * self.data.work.shape.token_bytes

    @property
    def attend_bytes(self) -> float:
        """Keys and values that attention must read: every row's tokens once."""
        attended = self.plan.num_attended(self.method) / self.plan.query_len
        return 2.0 * float(attended.sum()) * self.data.work.shape.token_bytes

    @property
    def flops(self) -> float:
        shape = self.data.work.shape
        candidates = (self.plan.candidate_end - self.method.n_init)[~self.plan.dense]
        scores = 2.0 * float(candidates.sum(dtype=np.int64))
        attention = 4.0 * float(self.plan.num_attended(self.method).sum())
        return (scores + attention) * shape.num_heads * shape.head_size
