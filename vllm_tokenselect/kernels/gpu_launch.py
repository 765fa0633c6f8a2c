"""What the Triton kernels' launchers know of the device.

Kernels are told which numbers and addresses not to specialize on: what changes from step to step must
not make a running server compile.
"""

from __future__ import annotations

from functools import cache

import torch
import triton

SMALLEST_PRODUCT = 16  # lines that a tensor core's product has at least
LARGEST_PRODUCT = 128
PROGRAMS_PER_MULTIPROCESSOR = 4

INTERPRETED: bool = triton.knobs.runtime.interpret
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype in _FP8


def warps_of_row(num_heads: int, num_kv_heads: int, head_size: int) -> int:
    """Warps of a program that scores one row, or decides for one: with as many both add up alike."""
    return 8 if num_heads // num_kv_heads > 32 or head_size > 256 else 4


@cache
def num_multiprocessors() -> int:
    """Of the current GPU; a few where there is none."""
    if not torch.cuda.is_available():
        return 2
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.multi_processor_count)


def num_programs_wanted() -> int:
    """Programs that keep the current GPU busy."""
    return PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors()
