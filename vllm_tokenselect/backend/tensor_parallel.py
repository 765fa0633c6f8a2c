"""What the ranks of vLLM's tensor-parallel group tell each other where all of them vote together.

Two exchanges a layer and group of rows, both by vLLM's own communicator, which CUDA graphs may capture:
the queries of the rows that may reuse a selection, before that is decided, so that every rank decides as
one process with all heads would; and the votes, before tokens are selected by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_tokenselect.config import TokenSelectConfig


@dataclass(frozen=True)
class TensorParallelHeads:
    """A layer's heads among the ranks; see `HeadGroup`.

    Attributes:
        size: ranks.
        num_kv_heads: of the whole layer, each counted once where ranks share them.
    """

    size: int
    num_kv_heads: int

    def gather_heads(self, query: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = get_tp_group().all_gather(query.contiguous(), dim=1)
        return gathered

    def sum_votes(self, votes: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = get_tp_group().all_reduce(votes)
        return summed


def heads_that_vote_together(
    vllm_config: VllmConfig, num_kv_heads: int
) -> TensorParallelHeads | None:
    """The ranks that select the same tokens; None where a rank selects for itself.

    Args:
        num_kv_heads: of a layer on this rank.
    """
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    size = vllm_config.parallel_config.tensor_parallel_size
    if size == 1 or config.method.vote == "local":
        return None
    of_model = vllm_config.model_config.get_total_num_kv_heads()
    return TensorParallelHeads(size, min(size * num_kv_heads, of_model))
