"""What a hook expects of the vLLM function it wraps, checked against vLLM's source.

The check reads source text only. The same expectation is thus checked at server start against the
installed vLLM, and ahead of time against a release that was downloaded but not installed.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

# A vLLM built with our diffs in patches/ calls the hook itself.
PATCH_MARK = "vllm_tokenselect"

Status = Literal["holds", "patched", "broken"]


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
        module: dotted module of vLLM.
        qualname: `function` or `Class.method` in it.
        parameters: names of its first parameters, in order.
        contains: fragments that its body must contain, whitespace apart: what the hook relies on.
        why: what the hook is for.
    """

    name: str
    module: str
    qualname: str
    parameters: tuple[str, ...]
    why: str
    contains: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return f"{self.module}:{self.qualname}"

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
        """Check against the vLLM that this Python would import, without importing the module."""
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            return self._finding("broken", "vLLM is not installed")
        return self.check_tree(Path(spec.submodule_search_locations[0]).parent)

    def require(self) -> Status:
        """Return whether the hook has still to be installed (`holds`) or is built in (`patched`).

        Raises:
            SeamBroken: when vLLM's function is not what the hook expects.
        """
        finding = self.check_installed()
        if finding.status == "holds" or finding.status == "patched":
            return finding.status
        raise SeamBroken(
            f"vllm-tokenselect cannot hook into this vLLM: {self.target}: {finding.detail}. "
            "Install a supported vLLM release (0.32 or 0.33) or a newer vllm-tokenselect; "
            "`tokenselect doctor` lists every hook."
        )

    def _finding(self, status: Status, detail: str) -> Finding:
        return Finding(self.name, self.target, status, detail)


def replace_everywhere(name: str, original: object, replacement: object) -> None:
    """Put `replacement` into every module that has imported the function `original` as `name`."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


# The seams of one module follow each other, and vLLM's largest takes a while to parse.
@lru_cache(maxsize=1)
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
