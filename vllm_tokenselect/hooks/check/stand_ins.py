"""Stand-ins for vLLM's compiled modules. `start` copies this file as `sitecustomize.py`.

Python imports it at the start of every process, also of those that vLLM starts.
"""

import importlib.abc
import importlib.machinery
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# `vllm._C`, `vllm._moe_C_stable_libtorch`, `vllm.vllm_flash_attn._vllm_fa3_C`, `vllm.cumem_allocator`.
_COMPILED = re.compile(r"vllm\.(\w+\.)*(\w*_C(_\w+)?|cumem_allocator|spinloop)")
# vLLM asks these while it is imported; the others are called by models only.
_QUERY = re.compile(r"torch\.ops\._C\.(\w*support\w*)\(cuda_device_capability\)")
_libraries: list[Any] = []


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for compiled ones that no other finder has found."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if _COMPILED.fullmatch(fullname):
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm._C_stable_libtorch":
            _define_queries()


def _define_queries() -> None:
    """Operations that tell whether a GPU supports something, all of which say no."""
    import torch

    library: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)  # its operations live as long as it does
    source = Path(sys.modules["vllm"].__path__[0]).joinpath("_custom_ops.py").read_text()
    for name in sorted(set(_QUERY.findall(source))):
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: False, "CompositeExplicitAutograd")


sys.meta_path.append(StandIns())
