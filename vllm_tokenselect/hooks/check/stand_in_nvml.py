"""Stand-in for NVML: a machine with one H200. `start` puts it in the place of vLLM's own."""

from types import SimpleNamespace

NVML_P2P_CAPS_INDEX_NVLINK = 0
NVML_P2P_STATUS_OK = 0


class NVMLError(Exception):
    """NVML's only exception."""


def nvmlInit() -> None:
    pass


def nvmlShutdown() -> None:
    pass


def nvmlDeviceGetCount() -> int:
    return 1


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetCudaComputeCapability(handle: int) -> tuple[int, int]:
    return 9, 0


def nvmlDeviceGetName(handle: int) -> str:
    return "NVIDIA H200"


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    return SimpleNamespace(total=141 << 30, free=141 << 30, used=0)
