"""One step's plan and sparse block table, from vLLM's metadata."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_tokenselect.backend.cpu_attention import CpuAttentionRow, plan_cpu_attention
from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.hooks.runner_v1 import current_requests
from vllm_tokenselect.hooks.runner_v2 import request_table
from vllm_tokenselect.kernels.operations import cpu_operations
from vllm_tokenselect.plan import SelectionPlan
from vllm_tokenselect.requests import Activity, StepRequests
from vllm_tokenselect.selection import StepSelection


@dataclass
class TokenSelectMetadata(AttentionMetadata):
    """What the layers of one step share."""

    num_actual_tokens: int
    step: StepSelection
    library_rows: dict[int, CpuAttentionRow]


class TokenSelectMetadataBuilder(AttentionMetadataBuilder[TokenSelectMetadata]):
    """Plans each step on the host, once for all layers of a KV cache group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if not isinstance(kv_cache_spec, FullAttentionSpec):
            raise SettingsError(
                f"TOKENSELECT serves full-attention layers only, got {kv_cache_spec} for "
                f"{layer_names[0]}"
            )
        self.config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
        scheduler = vllm_config.scheduler_config
        self.config.check_engine(
            block_size=kv_cache_spec.block_size,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_seqs=scheduler.max_num_seqs,
        )
        self.block_size = kv_cache_spec.block_size
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.head_size = kv_cache_spec.head_size
        self.dtype = vllm_config.model_config.dtype
        self.num_heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.operations = cpu_operations()
        self.model_runner_v2 = vllm_config.use_v2_model_runner

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: object, kv_cache_spec: object
    ) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TokenSelectMetadata:
        query_start_loc = common_attn_metadata.query_start_loc_cpu.numpy()
        seq_lens = common_attn_metadata.seq_lens.numpy()
        requests = self._requests(common_attn_metadata)
        # A dummy step belongs to no request; planned as a prompt that ends with it.
        prompt_lens = seq_lens if requests is None else requests.table.prompt_lens[requests.slots]
        plan = SelectionPlan.build(query_start_loc, seq_lens, prompt_lens, self.config)
        if requests is not None and self.config.log_requests:
            self._record(requests, plan, prompt_lens)
        step = StepSelection(
            plan,
            common_attn_metadata.block_table_tensor,
            self.block_size,
            self.num_heads,
            self.config,
            self.operations,
        )
        library_rows = {
            row: plan_cpu_attention(
                num_queries=int(plan.query_len[row]),
                num_keys=int(step.lengths[row]),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                dtype=self.dtype,
            )
            for row in (plan.query_len > 1).nonzero()[0].tolist()
        }
        return TokenSelectMetadata(common_attn_metadata.num_actual_tokens, step, library_rows)

    def _requests(self, metadata: CommonAttentionMetadata) -> StepRequests | None:
        if not self.model_runner_v2:
            return current_requests()
        table = request_table()
        if table is None or metadata.req_idx is None:
            return None
        return StepRequests(table, metadata.req_idx)

    def _record(self, requests: StepRequests, plan: SelectionPlan, prompt_lens: np.ndarray) -> None:
        attended, context = plan.num_attended(self.config), plan.num_in_context()
        prefill = plan.chunk_start < prompt_lens[plan.row_seq]
        for seq, request_id in enumerate(requests.table.ids_of(requests.slots)):
            counts = [
                int(values[(plan.row_seq == seq) & kind].sum())
                for kind in (prefill, ~prefill)
                for values in (attended, context, plan.query_len)
            ]
            requests.table.record(request_id, Activity(*counts))
