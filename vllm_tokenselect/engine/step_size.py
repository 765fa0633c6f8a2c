"""Refuse, at start, options of vLLM that make a step too small for a query chunk.

A step that cannot hold a whole chunk computes nothing of the prompt, and vLLM would try again for ever.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.replayed_steps import prompt_steps
from vllm_tokenselect.method.settings import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_steps(
    config: TokenSelectConfig,
    vllm_config: VllmConfig,
    block_size: int,
    steps_end_at_blocks: bool = False,
) -> None:
    """Check the options of vLLM that bound a step.

    Args:
        config: our settings.
        vllm_config: vLLM's configuration, with a model.
        block_size: tokens of a KV block; 1 while vLLM may still change it.
        steps_end_at_blocks: whether vLLM ends prefill steps where a block ends (`check_engine`).

    Raises:
        SettingsError: by the option's name, with what is allowed.
    """
    scheduler = vllm_config.scheduler_config
    prompt_steps(vllm_config, config.method.for_blocks(block_size)).check()
    config.check_engine(
        block_size=block_size,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_active_seqs or scheduler.max_num_seqs,
        max_num_scheduled_tokens=scheduler.max_num_scheduled_tokens,
        long_prefill_token_threshold=scheduler.long_prefill_token_threshold,
        num_drafts=vllm_config.num_speculative_tokens,
        steps_end_at_blocks=steps_end_at_blocks,
    )
    model = vllm_config.model_config
    longest, scheduled = model.max_model_len, scheduler.max_num_scheduled_tokens
    if not scheduler.enable_chunked_prefill and scheduled is not None and scheduled < longest:
        raise SettingsError(
            f"max_num_scheduled_tokens={scheduled} cannot hold a prompt of up to "
            f"max_model_len={longest} tokens, and without chunked prefill a prompt is computed in one "
            "step. Leave out --no-enable-chunked-prefill or --max-num-scheduled-tokens, or lower "
            "--max-model-len."
        )
    if scheduler.disable_chunked_mm_input and model.supports_multimodal_inputs:
        raise SettingsError(
            "TOKENSELECT cannot keep both images and query chunks whole in a step "
            "(--disable-chunked-mm-input, which vLLM sets itself for models whose images attend in "
            "both directions). Leave it out, or serve text alone with --language-model-only."
        )


def check_hybrid_steps(vllm_config: VllmConfig) -> None:
    """Check the options with the KV blocks of a hybrid model that was just made.

    vLLM makes the blocks larger once the weights are loaded, so that they hold a state as well. This
    function does not change the configuration.

    Raises:
        SettingsError: by the option's name, with what is allowed.
    """
    if not vllm_config.model_config.is_hybrid:
        return
    from vllm.platforms import current_platform

    looked_at = copy.copy(vllm_config)
    looked_at.cache_config = copy.copy(vllm_config.cache_config)
    current_platform.update_block_size_for_backend(looked_at)
    config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
    block_size = looked_at.cache_config.block_size
    check_steps(config, looked_at, block_size, ends_steps_at_blocks(looked_at))


def ends_steps_at_blocks(vllm_config: VllmConfig) -> bool:
    """Whether vLLM ends prefill steps with blocks: prefixes of a hybrid model match inside of blocks."""
    cache, hybrid = vllm_config.cache_config, vllm_config.model_config.is_hybrid
    return bool(
        hybrid and cache.mamba_cache_mode == "align" and cache.prefix_match_unit is not None
    )
