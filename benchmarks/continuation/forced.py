"""A logits processor of vLLM that makes a request generate given tokens.

The server decodes as always: each token is generated, and what it attends to is what a generated token
attends to. Log-probabilities are the model's own, since vLLM takes them before (`raw_logprobs`).
"""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

from benchmarks.continuation.served import FORCED


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves of each generated token's logits only that of the given token."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        tokens = (params.extra_args or {}).get(FORCED)
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(logits, -torch.inf)
            forced[tokens[len(output_ids)]] = 0.0
            return forced

        return force
