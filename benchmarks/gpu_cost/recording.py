"""Which kernels a layer launches, noted in place of launching them: no GPU, and hardly any memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from vllm_tokenselect.kernels import gpu_launch

ELEMENTS_PER_PROGRAM = 512  # of PyTorch's kernels that work element by element
FLASH_TILE = 128


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: name of the Triton function, of PyTorch's operation, or of the library's kernel.
        grid: numbers of programs.
        arguments: what was handed over, by name.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


class Recorder(TorchDispatchMode):
    """Notes launches: Triton's, PyTorch's, and those of a library that stands in for itself here."""

    def __init__(self, multiprocessors: int) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.multiprocessors = multiprocessors

    def note(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel, grid, arguments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _launches(func):
            grid = (math.ceil(result.numel() / ELEMENTS_PER_PROGRAM),)
            self.note(func._schema.name, grid, {"out": result})
        return result

    def flash_attention(self, **arguments: Any) -> None:
        """Stands in for `flash_attn_varlen_func`, of which version 3 launches two kernels, or three.

        It splits tokens where its tiles leave multiprocessors idle, and it may. The third adds them up.
        """
        query, keys = arguments["q"], arguments["k"]
        num_rows, num_kv_heads = len(arguments["seqused_k"]), keys.shape[2]
        lines = arguments["max_seqlen_q"] * query.shape[1] // num_kv_heads
        tiles = num_rows * num_kv_heads * math.ceil(lines / FLASH_TILE)
        wanted = math.ceil(self.multiprocessors / tiles)
        splits = max(min(wanted, arguments["num_splits"] or wanted), 1)
        arguments["splits"] = splits
        self.note("flash_prepare", (1,), arguments)
        self.note("flash_forward", (tiles, splits), arguments)
        if arguments["num_splits"] != 1:
            self.note("flash_combine", (len(query), query.shape[1]), arguments)


def _launches(func: Any) -> bool:
    """Whether PyTorch's operation runs a kernel: it is no view, and more than an allocation."""
    returns, name = func._schema.returns, func._schema.name
    is_view = returns and returns[0].alias_info and not returns[0].alias_info.is_write
    return not is_view and not name.startswith(("aten::empty", "aten::new_empty"))


@contextmanager
def recording(multiprocessors: int) -> Iterator[Recorder]:
    """Within it every launch is noted, as on a GPU with so many multiprocessors, and nothing is run."""
    recorder = Recorder(multiprocessors)

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        recorder.note(kernel.fn.__name__, tuple(grid(named) if callable(grid) else grid), named)

    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    with ExitStack() as stack:
        stack.callback(_forget_device)
        for target, name, stand_in in (
            (JITFunction, "run", note),
            (InterpretedFunction, "run", note),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_properties", lambda device: properties),
        ):
            stack.enter_context(patch.object(target, name, stand_in))
        _forget_device()
        stack.enter_context(recorder)
        yield recorder


def _forget_device() -> None:
    """Let the launchers ask anew how large the GPU is."""
    for each in vars(gpu_launch).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()
