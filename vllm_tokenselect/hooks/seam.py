"""What a hook expects of vLLM's function, checked against vLLM's source; and how it wraps the function.

The functions of a package that vLLM calls, as LMCache's, are checked in the same way.

The check reads source text only. The same expectation is thus checked at server start against the
installed vLLM, and ahead of time against a release that was downloaded but not installed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_tokenselect.engine.lmcache import TESTED

# A vLLM built with our diffs in patches/ calls the hook itself.
PATCH_MARK = "vllm_tokenselect"

# By package: its name, and what to install where it is not what a hook expects.
_SUPPORTED = {
    "vllm": ("vLLM", "a supported vLLM release (0.32 or 0.33)"),
    "lmcache": ("LMCache", TESTED),
}

Status = Literal["holds", "patched", "broken"]
# Called in the place of a function of vLLM: with that function, and then the arguments of the call.
Around = Callable[..., Any]


class SeamBroken(RuntimeError):
    """vLLM's function is not what the hook expects; serving on would give wrong results."""


@dataclass(frozen=True)
class Finding:
    """Outcome of one check."""

    name: str
    target: str
    status: Status | Literal["not needed"]
    detail: str


@dataclass(frozen=True)
class Seam:
    """One function of vLLM that we wrap or override.

    Attributes:
        name: the hook's name, as the file in `hooks/` that owns it.
        module: dotted module of vLLM, or of LMCache.
        qualname: `function` or `Class.method` in it.
        parameters: names of its first parameters, in order.
        why: what the hook is for.
        retired_by: the change in vLLM after which the hook can go.
        contains: fragments that its body must contain, whitespace apart: what the hook relies on.
        calls: what is wrapped in the function's stead, if anything: a function that its body calls by a
            name of its own class (`Class.method`) or module.
    """

    name: str
    module: str
    qualname: str
    parameters: tuple[str, ...]
    why: str
    retired_by: str
    contains: tuple[str, ...] = ()
    calls: str = ""

    @property
    def target(self) -> str:
        return f"{self.module}:{self.qualname}"

    @property
    def _package(self) -> str:
        return self.module.partition(".")[0]

    def check_source(self, source: str) -> Finding:
        """Check the source text of the module."""
        try:
            tree = _parse(source)
        except SyntaxError as error:
            return self._finding("broken", f"{self.module} cannot be parsed: {error}")
        function = _find(tree, self.qualname.split("."))
        if function is None:
            return self._finding("broken", f"{self.qualname} does not exist")
        names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
        if tuple(names[: len(self.parameters)]) != self.parameters:
            return self._finding(
                "broken", f"expected parameters {list(self.parameters)}, found {names}"
            )
        body = ast.get_source_segment(source, function) or ""
        squeezed = "".join(body.split())
        for fragment in self.contains:
            if "".join(fragment.split()) not in squeezed:
                return self._finding("broken", f"its body no longer contains `{fragment}`")
        if PATCH_MARK in body:
            return self._finding("patched", "vLLM was built with the project's diff")
        return self._finding("holds", self.why)

    def check_tree(self, root: Path) -> Finding:
        """Check against a vLLM source tree; `root` is the folder that holds the `vllm` package."""
        path = root.joinpath(*self.module.split(".")).with_suffix(".py")
        if not path.is_file():
            return self._finding("broken", f"{self.module} does not exist")
        return self.check_source(path.read_text(encoding="utf-8"))

    def check_installed(self) -> Finding:
        """Check against the release that this Python would import, without importing the module."""
        spec = importlib.util.find_spec(self._package)
        if spec is None or not spec.submodule_search_locations:
            return self._finding("broken", f"{self._package} is not installed")
        return self.check_tree(Path(spec.submodule_search_locations[0]).parent)

    def require(self) -> Status:
        """Return whether the hook has still to be installed (`holds`) or is built in (`patched`).

        Raises:
            SeamBroken: when vLLM's function is not what the hook expects.
        """
        finding = self.check_installed()
        if finding.status == "holds" or finding.status == "patched":
            return finding.status
        name, supported = _SUPPORTED[self._package]
        raise SeamBroken(
            f"vllm-tokenselect cannot hook into this {name}: {self.target}: {finding.detail}. "
            f"Install {supported} or a newer vllm-tokenselect; `tokenselect doctor` lists every hook of "
            "vLLM."
        )

    def wrap(self, around: Around, owner: type | None = None) -> None:
        """Wrap the function as `wrap_function` does, unless vLLM was built with our diff.

        A function of a module is wrapped in every module that has imported it; what `calls` names, only
        where this seam's function finds it.

        Args:
            around: what is called in its place.
            owner: the class to wrap it in, if not the seam's own: one that inherits from it.

        Raises:
            SeamBroken: when vLLM's function is not what the hook expects. It is then left as it is.
        """
        *classes, name = (self.calls or self.qualname).split(".")
        try:
            holder: Any = owner
            if owner is None:
                holder = functools.reduce(getattr, classes, importlib.import_module(self.module))
            # Asked first: the check reads and parses vLLM's source.
            wrapped = is_wrapped(holder, name)
        except (ImportError, AttributeError):
            self.require()
            raise
        if not wrapped and self.require() == "holds":
            wrap_function(holder, name, around, everywhere=not classes and not self.calls)

    def _finding(self, status: Status, detail: str) -> Finding:
        return Finding(self.name, self.target, status, detail)


def wrap_function(owner: Any, name: str, around: Around, everywhere: bool = False) -> None:
    """Call `around` in the place of a function; safe to call again.

    The wrapper is a function or class method like the original, with its name, signature and docstring.
    The original is its `__wrapped__`.

    Args:
        owner: the class or module that has it.
        around: what is called: with the original, and then the arguments.
        everywhere: wrap it as well in all modules that have imported it.
    """
    if is_wrapped(owner, name):
        return
    found = inspect.getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else found

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper._tokenselect = around  # type: ignore[attr-defined]
    owners = [owner]
    if everywhere:
        modules = list(sys.modules.values())
        owners += [m for m in modules if getattr(m, "__dict__", {}).get(name) is original]
    for each in owners:
        setattr(each, name, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)


def is_wrapped(owner: Any, name: str) -> bool:
    """Whether the function was wrapped by us, in `owner` or in a class that it inherits from."""
    found = inspect.getattr_static(owner, name)
    return hasattr(getattr(found, "__func__", found), "_tokenselect")


# The seams of one module follow each other, and vLLM's largest takes a while to parse.
@functools.lru_cache(maxsize=1)
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _find(tree: ast.Module, path: list[str]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    nodes: list[ast.stmt] = tree.body
    for depth, name in enumerate(path, start=1):
        last = depth == len(path)
        kind = _FUNCTIONS if last else ast.ClassDef
        found = next((n for n in nodes if isinstance(n, kind) and n.name == name), None)
        if found is None:
            return None
        if isinstance(found, _FUNCTIONS):
            return found
        nodes = found.body
    return None
