"""One step's plan and sparse block table on a CPU, from vLLM's metadata."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, CommonAttentionMetadata

from vllm_tokenselect.backend.metadata import TokenSelectMetadataBuilder
from vllm_tokenselect.counters import worker_counters
from vllm_tokenselect.cpu.step import CpuStep


@dataclass
class CpuTokenSelectMetadata(AttentionMetadata):
    """What the layers of one step share."""

    step: CpuStep


class CpuTokenSelectMetadataBuilder(TokenSelectMetadataBuilder[CpuTokenSelectMetadata]):
    """Also fills what is the same for all layers: rows that see their whole context."""

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
        step = CpuStep.of_plan(
            self.plan(common_attn_metadata, common_attn_metadata.seq_lens.numpy()),
            common_attn_metadata.block_table_tensor,
            self.block_size,
            self.num_heads,
            self.method,
            worker_counters(torch.device("cpu")),
            self.config.workspace_bytes("cpu"),
            self.heads,
        )
        return CpuTokenSelectMetadata(step)
