"""Which steps CUDA graphs may replay as a whole, and which prompts have to stay out of them.

Any process imports this, also where Triton is not installed.
"""

from __future__ import annotations

from typing import Any

from vllm_tokenselect.method.prompt_steps import PromptSteps
from vllm_tokenselect.method.settings import Method


def queries_per_request(vllm_config: Any) -> int:
    """Most tokens of a request in a decoding step."""
    speculative = vllm_config.speculative_config
    return 1 + ((speculative.num_speculative_tokens or 0) if speculative is not None else 0)


def replays_steps(vllm_config: Any) -> bool:
    """Whether whole decoding steps may be replayed by CUDA graphs."""
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is not None and bool(mode.has_full_cudagraphs())


def prompt_steps(vllm_config: Any, method: Method) -> PromptSteps:
    """Where the steps of prompts may end.

    Args:
        method: with query chunks that line up with the KV blocks.
    """
    stays_out = method.shares_selections and replays_steps(vllm_config)
    return PromptSteps(method, queries_per_request(vllm_config) if stays_out else 0)
