"""One step's plan and sparse block table on a CPU, from vLLM's metadata."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_tokenselect.backend.cpu_attention import CpuAttentionRow, plan_cpu_attention
from vllm_tokenselect.backend.metadata import TokenSelectMetadataBuilder
from vllm_tokenselect.counters import worker_counters
from vllm_tokenselect.cpu.step import StepSelection
from vllm_tokenselect.kernels.operations import cpu_operations


@dataclass
class CpuTokenSelectMetadata(AttentionMetadata):
    """What the layers of one step share."""

    num_actual_tokens: int
    step: StepSelection
    library_rows: dict[int, CpuAttentionRow]


class CpuTokenSelectMetadataBuilder(TokenSelectMetadataBuilder[CpuTokenSelectMetadata]):
    """Also fills what is the same for all layers: rows that see their whole context."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.operations = cpu_operations()

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
    ) -> CpuTokenSelectMetadata:
        step = StepSelection(
            self.plan(common_attn_metadata, common_attn_metadata.seq_lens.numpy()),
            common_attn_metadata.block_table_tensor,
            self.block_size,
            self.num_heads,
            self.method,
            self.operations,
            worker_counters(torch.device("cpu")),
            self.config.workspace_bytes("cpu"),
            self.heads,
        )
        plan = step.plan
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
        return CpuTokenSelectMetadata(common_attn_metadata.num_actual_tokens, step, library_rows)
