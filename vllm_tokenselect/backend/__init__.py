"""vLLM's attention interface over the project's plan, selection and attention. Computes nothing.

`cpu_*` and `gpu_*` are the two kinds of devices; `impl` and `metadata` are what they share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

if TYPE_CHECKING:
    from vllm_tokenselect.backend.impl import TokenSelectImpl
    from vllm_tokenselect.backend.metadata import TokenSelectMetadataBuilder


class TokenSelectBackend(AttentionBackend):
    """The backend behind `--attention-backend TOKENSELECT`."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar = [
        "auto",
        "float32",
        "bfloat16",
        "float16",
        *(["fp8", "fp8_e4m3", "fp8_e5m2"] if current_platform.is_cuda() else []),
    ]

    @staticmethod
    def get_name() -> str:
        return "TOKENSELECT"

    @staticmethod
    def get_impl_cls() -> type[TokenSelectImpl[Any]]:
        if current_platform.is_cuda():
            from vllm_tokenselect.backend.gpu_impl import GpuTokenSelectImpl

            return GpuTokenSelectImpl
        from vllm_tokenselect.backend.cpu_impl import CpuTokenSelectImpl

        return CpuTokenSelectImpl

    @staticmethod
    def get_builder_cls() -> type[TokenSelectMetadataBuilder[Any]]:
        if current_platform.is_cuda():
            from vllm_tokenselect.backend.gpu_metadata import GpuTokenSelectMetadataBuilder

            return GpuTokenSelectMetadataBuilder
        from vllm_tokenselect.backend.cpu_metadata import CpuTokenSelectMetadataBuilder

        return CpuTokenSelectMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        # What vLLM's CPU attention, which attends the gathered tokens, is built for. On GPUs SDPA takes
        # all of them, FlashAttention most.
        return [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability | None) -> bool:
        return capability is None or capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
    ) -> str | None:
        sizes = cls.get_supported_head_sizes()
        if head_size not in sizes:
            return f"this model's heads have {head_size} elements; supported are {sizes}"
        e4m3 = kv_cache_dtype in ("fp8", "fp8_e4m3")
        if e4m3 and device_capability is not None and device_capability < DeviceCapability(8, 9):
            return "this GPU knows no fp8 e4m3 (--kv-cache-dtype fp8_e5m2 works)"
        return None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        # [num_blocks, num_kv_heads, block_size, 2 * head_size], each layer by itself.
        if not current_platform.is_cuda():
            # A head's keys of a block together, its values after them.
            return (KVCacheLayout.LBHNC,)
        if current_platform.has_device_capability(90) and not (
            current_platform.has_device_capability(100)
        ):
            # All heads of a token together: tokens lie at equal distances through all blocks, which
            # is what lets FlashAttention 3 read single tokens.
            return (KVCacheLayout.LBNHC,)
        # Other GPUs gather, from any layout: whatever the model's other layers need (FLASHINFER on
        # Blackwell puts a head's tokens together).
        return None
