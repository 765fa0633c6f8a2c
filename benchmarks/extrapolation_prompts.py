"""The prompts of the benchmark, which are those of `tokenselect eval`.

Whatever changes a prompt there makes other cells of those that a run with --resume goes on with.
"""

from vllm_tokenselect.evaluation.hidden import (
    ANSWER_TOKENS,
    NEEDLE,
    PASSKEY,
    HiddenPrompt,
    is_right,
    needle_prompts,
    passkey_prompt,
)
from vllm_tokenselect.evaluation.text import document

__all__ = [
    "ANSWER_TOKENS",
    "NEEDLE",
    "PASSKEY",
    "HiddenPrompt",
    "document",
    "is_right",
    "needle_prompts",
    "passkey_prompt",
]
