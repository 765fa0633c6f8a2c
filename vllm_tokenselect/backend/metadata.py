"""What the metadata builders of all devices have in common: the plan of a step."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_tokenselect.backend.tensor_parallel import heads_that_vote_together
from vllm_tokenselect.engine.anchors import count_anchors, refuse_to_share
from vllm_tokenselect.engine.dense_layers import refuse_selecting
from vllm_tokenselect.engine.kv_cache import check_cache
from vllm_tokenselect.engine.log import get_logger
from vllm_tokenselect.engine.step_requests import current_requests, request_table
from vllm_tokenselect.kernels.head_group import num_voting_heads
from vllm_tokenselect.kernels.selection_cache.state import SelectionCacheState
from vllm_tokenselect.method.plan import SelectionPlan
from vllm_tokenselect.method.requests import BatchRequests, StepRequests

M = TypeVar("M", bound=AttentionMetadata)

logger = get_logger(__name__)


class TokenSelectMetadataBuilder(AttentionMetadataBuilder[M]):
    """Plans each step on the host, once for all layers of a KV cache group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = check_cache(kv_cache_spec, layer_names[0], vllm_config)
        refuse_selecting(layer_names, self.config)
        refuse_to_share(layer_names, vllm_config, self.config)
        scheduler = vllm_config.scheduler_config
        # As the scheduler has it: the block size is final once a model is loaded, and the same for both.
        # That of the cache here may be a part of it, which every backend of the group's layers can read.
        self.method = self.config.method.for_blocks(vllm_config.cache_config.block_size)
        self.block_size = kv_cache_spec.block_size
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.head_size = kv_cache_spec.head_size
        self.dtype = vllm_config.model_config.dtype
        self.num_heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.heads = heads_that_vote_together(vllm_config, self.num_kv_heads)
        self.model_runner_v2 = vllm_config.use_v2_model_runner
        self._log_selection_cache(count_anchors(layer_names, vllm_config), scheduler.max_num_seqs)

    def _log_selection_cache(self, num_layers: int, num_requests: int) -> None:
        if not self.method.reuses_selections:
            return
        layer = SelectionCacheState.allocate(
            num_requests,
            self.method.selection_size,
            num_voting_heads(self.num_heads, self.heads),
            self.head_size,
            self.dtype,
            torch.device("meta"),
        )
        logger.info_once(
            "TOKENSELECT: the Selection Cache of %d layers has %d MiB for %d requests",
            num_layers,
            num_layers * layer.num_bytes >> 20,
            num_requests,
            scope="global",
        )

    def plan(
        self, metadata: CommonAttentionMetadata, seq_lens: npt.NDArray[np.int32]
    ) -> SelectionPlan:
        """Rows of the step.

        Args:
            metadata: of the step.
            seq_lens: int32 [S], the contexts' lengths, or an upper bound where a request generates.
        """
        query_start_loc = metadata.query_start_loc_cpu.numpy()
        requests = self._requests(metadata)
        batch = BatchRequests.of_step(requests, seq_lens, self.method.top_k)
        return SelectionPlan.build(query_start_loc, seq_lens, batch, self.method)

    def _requests(self, metadata: CommonAttentionMetadata) -> StepRequests | None:
        if not self.model_runner_v2:
            return current_requests()
        table = request_table(self.vllm_config)
        if table is None or metadata.req_idx is None:
            return None
        return StepRequests(table, metadata.req_idx)
