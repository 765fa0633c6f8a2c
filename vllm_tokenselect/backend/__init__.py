"""vLLM's attention interface over the project's plan, selection and attention. Computes nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_tokenselect.backend.impl import TokenSelectImpl
from vllm_tokenselect.backend.metadata import TokenSelectMetadataBuilder


class TokenSelectBackend(AttentionBackend):
    """The backend behind `--attention-backend TOKENSELECT`."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float32", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "TOKENSELECT"

    @staticmethod
    def get_impl_cls() -> type[TokenSelectImpl]:
        return TokenSelectImpl

    @staticmethod
    def get_builder_cls() -> type[TokenSelectMetadataBuilder]:
        return TokenSelectMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        # What vLLM's CPU attention, which attends the gathered tokens, is built for.
        return [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # [num_blocks, num_kv_heads, block_size, 2 * head_size], each layer by itself: a head's keys
        # of a block lie together, its values after them.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False
