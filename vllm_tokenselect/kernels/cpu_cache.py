"""Where the machine code of the CPU kernels is kept from one process to the next.

In place of numba's own `cache=True`, which follows only the file of the outermost kernel, so that a kernel
would live on after a change of what it calls, and which stops where no folder can be written to.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import pickle
import platform
import tempfile
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config, njit
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

# The OpenMP layer runs in PyTorch's own thread pool where vLLM preloads its libgomp. numba's other pools
# would put their threads on the one core that vLLM binds the worker's main thread to.
config.THREADING_LAYER = "omp"

Function = Callable[..., Any]

_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("kernels/**/*.py", "cpu/*.py", "counters.py")
_IN_THE_PACKAGE = Path(__file__).parent / "__pycache__"


def compile_once(**options: Any) -> Callable[[Function], Any]:
    """`numba.njit(**options)` for a kernel that is called from Python, kept in `kept_in()`."""

    def decorate(function: Function) -> Any:
        kernel = njit(**options)(function)
        kernel._cache = _KernelCache(function)
        return kernel

    return decorate


@cache
def kept_in() -> Path | None:
    """The folder that compiled kernels are written to; None where no folder can be written to.

    The first of NUMBA_CACHE_DIR, the package, the user's cache and the system's temporary folder.
    """
    return next(filter(_can_be_written, _folders()), None)


def is_temporary(folder: Path) -> bool:
    """Whether the folder is below the system's temporary one."""
    return folder.name == _TEMPORARY


_TEMPORARY = f"vllm-tokenselect-kernels-{os.getuid() if hasattr(os, 'getuid') else 0}"


def _folders() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR) / "vllm_tokenselect"
    yield _IN_THE_PACKAGE
    with contextlib.suppress(RuntimeError):  # no home folder is known
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        yield Path(home) / "vllm_tokenselect" / "kernels"
    with contextlib.suppress(OSError):  # no temporary folder at all
        yield Path(tempfile.gettempdir()) / _TEMPORARY


def _can_be_written(folder: Path) -> bool:
    """Makes the folder where it is missing. A temporary one is its user's alone: its code is run."""
    alone = is_temporary(folder)
    try:
        folder.mkdir(mode=0o700 if alone else 0o777, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        status = folder.stat(follow_symlinks=False)
    except OSError:
        return False
    return not alone or (status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0)


@cache
def _sources() -> str:
    """A digest of everything that the kernels are made from."""
    versions = numba.__version__, llvmlite.__version__, platform.python_version()
    digest = hashlib.sha256(repr(versions).encode())
    for path in sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)):
        if not path.stem.startswith("gpu"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class _KernelCache(NullCache):
    """One file for each kernel, kinds of arguments, processor and `_sources`.

    Processes that compile the same at once write the same file, each in one piece.
    """

    def __init__(self, function: Function) -> None:
        self._name = f"{Path(inspect.getfile(function)).parent.name}.{function.__name__}"

    @property
    def cache_path(self) -> str | None:
        folder = kept_in()
        return None if folder is None else str(folder)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        name = self._file_name(sig, target_context.codegen())
        # The package may have come with kernels that were compiled when its image was built.
        folders = (kept_in(), None if config.CACHE_DIR else _IN_THE_PACKAGE)
        for folder in filter(None, folders):
            with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
                parts = pickle.loads((folder / name).read_bytes())
                return CompileResult._rebuild(target_context, *parts)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        folder = kept_in()
        if folder is None:
            return
        path = folder / self._file_name(sig, data.codegen)
        written = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            written.write_bytes(dumps(data._reduce()))
            written.replace(path)
        except OSError:  # a full disk: the next process compiles again
            with contextlib.suppress(OSError):
                written.unlink()

    def _file_name(self, sig: Any, codegen: Any) -> str:
        key = repr((_sources(), sig, codegen.magic_tuple()))
        return f"{self._name}.{hashlib.sha256(key.encode()).hexdigest()[:32]}.nbc"
