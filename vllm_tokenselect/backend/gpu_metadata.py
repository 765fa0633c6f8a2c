"""One step's rows on a GPU, from vLLM's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_tokenselect.backend.gpu_attention import few_queries
from vllm_tokenselect.backend.metadata import TokenSelectMetadataBuilder
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.anchors import count_anchors
from vllm_tokenselect.engine.gpu_libraries import choose_library
from vllm_tokenselect.engine.graph_sizes import captured_steps, step_limits
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.replayed_steps import queries_per_request, replays_steps
from vllm_tokenselect.gpu.decoding_attention import count_attending
from vllm_tokenselect.gpu.graph_size import count_launches, num_groups
from vllm_tokenselect.gpu.rows import graph_rows, step_rows
from vllm_tokenselect.gpu.sending import RowBuffers
from vllm_tokenselect.gpu.step import GpuStep
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import NO_SEAT

# Of FlashAttention for a group of rows: it prepares, attends and combines.
ATTENTION_LAUNCHES = 3
GRAPHS = {
    "flash": AttentionCGSupport.UNIFORM_BATCH,
    "sdpa": AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE,
    "xformers": AttentionCGSupport.NEVER,  # its masks are made of lists on the host
}

logger = get_logger(__name__)


@dataclass
class GpuTokenSelectMetadata(AttentionMetadata):
    """What the layers of one step share."""

    step: GpuStep


class GpuTokenSelectMetadataBuilder(TokenSelectMetadataBuilder[GpuTokenSelectMetadata]):
    """Plans each step on the host, once for all layers of a KV cache group, without reading back."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.limits = step_limits(vllm_config, self.num_heads, self.num_kv_heads)
        self.queries_per_request = queries_per_request(vllm_config)
        capacity = max(
            vllm_config.scheduler_config.max_num_seqs * self.queries_per_request,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.buffers = RowBuffers(capacity, device)
        # Where layers share selections, the lines that are kept for a step bound it.
        shares = self.method.shares_selections
        self.graph_rows = self.limits.graph_rows if shares else capacity
        num_anchors = count_anchors(layer_names, vllm_config)
        self._log_graphs(vllm_config, num_anchors, len(layer_names))

    def _log_graphs(self, vllm_config: VllmConfig, num_anchors: int, num_layers: int) -> None:
        sizes = captured_steps(vllm_config)
        if not sizes:
            return
        selecting, following = (
            count_launches(
                self.limits,
                sizes[-1],
                self.queries_per_request,
                attention=self._attending,
                together=self.heads is not None,
                follows=follows,
            )
            for follows in (False, True)
        )
        followers = num_layers - num_anchors
        logger.info(
            "TOKENSELECT: CUDA graphs of %d step sizes, the largest of %d tokens in %d groups, "
            "contexts of up to %d tokens in all, about %d kernels a layer that selects%s, %d in %d layers",
            len(sizes),
            sizes[-1],
            num_groups(self.limits, sizes[-1], self.queries_per_request),
            self.limits.score_columns,
            selecting,
            f", {following} a layer that follows one" if followers else "",
            num_anchors * selecting + followers * following,
            num_layers,
        )

    def _attending(self, num_rows: int) -> int:
        """Launches of attending so many rows of a captured step, which have a query each."""
        if few_queries(self.config, self.vllm_config):
            return count_attending(self.limits, self.head_size, num_rows)
        return ATTENTION_LAUNCHES + self.method.reassigns_positions  # to rotate the queries

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        assert isinstance(kv_cache_spec, AttentionSpec)  # a builder is for layers of one kind
        config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
        if few_queries(config, vllm_config):  # the own kernel, of all decoding rows
            return AttentionCGSupport.UNIFORM_BATCH
        dtype = vllm_config.model_config.dtype
        return GRAPHS[choose_library(config.attention, kv_cache_spec.head_size, dtype)]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GpuTokenSelectMetadata:
        common: Any = common_attn_metadata
        # Exact for prompts; where draft tokens may have been rejected, the device knows better.
        bound = common.seq_lens_cpu_upper_bound.numpy()[: common.num_reqs]
        seq_lens = np.zeros(common.num_reqs, np.int32)  # padded requests have no bound
        seq_lens[: len(bound)] = bound
        plan = self.plan(common, seq_lens)
        if self._may_be_replayed(common, plan):
            groups = graph_rows(
                plan,
                seq_lens,
                common.seq_lens,
                self.limits,
                self.buffers,
                common.num_actual_tokens,
                self.queries_per_request,
            )
        else:
            groups = step_rows(plan, seq_lens, common.seq_lens, self.limits)
        return GpuTokenSelectMetadata(GpuStep(groups, common.block_table_tensor))

    def _may_be_replayed(self, common: Any, plan: SelectionPlan) -> bool:
        """Whether the step is written where a CUDA graph reads it.

        Raises:
            RuntimeError: for a prompt that selects in such a step, which takes it for generated tokens.
        """
        if (
            not replays_steps(self.vllm_config)
            or common.max_query_len > self.queries_per_request
            or common.num_actual_tokens > self.graph_rows
        ):
            return False
        prompts = ~plan.dense & ~plan.follows & (plan.seat != NO_SEAT)
        if self.method.shares_selections and prompts.any():
            raise RuntimeError(
                f"a step of up to {common.max_query_len} tokens a request has position "
                f"{plan.chunk_start[prompts][0]} of a prompt, which selects in every layer. A CUDA graph "
                "that may replay the step would take it for a generated token; the scheduler should have "
                "kept it out. Please report this with the server's options. --enforce-eager serves it."
            )
        return True
