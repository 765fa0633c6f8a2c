"""Check every seam and every diff of `patches/` against the source of a vLLM release."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_tokenselect.hooks import all_seams
from vllm_tokenselect.hooks.seam import PATCH_MARK, Seam

# What vLLM's Python reads; the rest of a wheel, most of it, is compiled or waits to be.
_READ = (".py", ".json", ".jinja")


class CheckFailed(Exception):
    """The check could not be made. The message says what to do."""


@dataclass
class Report:
    """Lines of the table and what is wrong, in words."""

    lines: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        header = ("hook", "vLLM function or diff", "as released", "with the diffs")
        rows = [header, *self.lines]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def check_release(source: Path, diffs: Sequence[Path], work: Path) -> Report:
    """Check every seam and every diff.

    Args:
        source: folder that holds the `vllm` package as released.
        diffs: unified diffs named after their hook: `runner_v1.patch`.
        work: empty folder for the patched copy.

    Raises:
        CheckFailed: when nothing can apply a diff on this machine.
    """
    report = Report()
    seams = all_seams()
    _copy_files(source, sorted(_files_of(seams, diffs)), work)
    released = [seam.check_tree(work) for seam in seams]
    report.problems += [
        f"{finding.target}: {finding.status}: {finding.detail}"
        for finding in released
        if finding.status != "holds"
    ]
    hooks = {seam.name for seam in seams}
    patched_hooks = set()
    for diff in diffs:
        error = apply_diff(diff, work)
        if diff.stem not in hooks:
            error = f"there is no hook {diff.stem!r}; a diff is named after its hook"
        report.lines.append((diff.stem, diff.name, "", "does not apply" if error else "applies"))
        if error:
            report.problems.append(f"{diff}: {error}")
        else:
            patched_hooks.add(diff.stem)
    for seam, before in zip(seams, released, strict=True):
        after = seam.check_tree(work)
        expected = "patched" if seam.name in patched_hooks else "holds"
        if before.status == "holds" and after.status != expected:
            report.problems.append(
                f"{seam.target}: expected {expected} with the diffs, found {after.status}: "
                f"{after.detail}"
            )
        report.lines.append((seam.name, seam.target, before.status, after.status))
    for name in sorted(_files_named_in(diffs)):
        report.problems += [f"{name}: {problem}" for problem in _check_patched_file(work / name)]
    return report


def apply_diff(diff: Path, tree: Path) -> str:
    """Apply a unified diff in the folder `tree`; returns what went wrong, empty if it applies.

    Raises:
        CheckFailed: when neither git nor patch is installed.
    """
    if shutil.which("git"):
        command = ["git", "apply", str(diff.resolve())]
    elif shutil.which("patch"):
        command = ["patch", "-p1", "--forward", "--fuzz=0", "-i", str(diff.resolve())]
    else:
        raise CheckFailed("neither git nor patch is installed, and one is needed to apply diffs")
    # Inside a repository, `git apply` leaves out what lies outside the current folder, silently.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    result = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    return "" if result.returncode == 0 else (result.stderr + result.stdout).strip()


def download(version: str, folder: Path) -> Path:
    """Download a vLLM release without installing it.

    Returns:
        a folder with its package `vllm`, without what is compiled.

    Raises:
        CheckFailed: when pip cannot get it.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*pip, "-d", str(folder), f"vllm=={version}"], check=False)
    wheels = list(folder.glob("vllm-*.whl"))
    if result.returncode or not wheels:
        raise CheckFailed(
            f"pip could not download vllm=={version} (see above). Is the version released, and for "
            "this platform? `--source DIR` checks a folder that holds the `vllm` package instead."
        )
    source = folder / wheels[0].stem
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(source, [name for name in wheel.namelist() if name.endswith(_READ)])
    wheels[0].unlink()
    return source


def find_diffs(patches: Path, version: str) -> tuple[list[Path], str]:
    """The diffs for a release, and what is wrong with them, empty if nothing is.

    A release without diffs of its own is checked with those of the newest one. They show what a new
    vLLM needs.

    Raises:
        CheckFailed: when there are no diffs at all.
    """
    if not patches.is_dir():
        raise CheckFailed(
            f"{patches} does not exist. The diffs are in the repository, not in the installed "
            "package: run this in a clone, or name the folder by --patches DIR."
        )
    releases = {folder.name: sorted(folder.glob("*.patch")) for folder in patches.iterdir()}
    releases = {name: diffs for name, diffs in releases.items() if diffs}
    if version in releases:
        return releases[version], ""
    if not releases:
        raise CheckFailed(f"{patches} holds no folder with diffs")
    newest = max(releases, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return releases[newest], (
        f"{patches / version} does not exist; tried the diffs of {newest}. Once they all apply, "
        f"copy them there."
    )


def _files_named_in(diffs: Sequence[Path]) -> set[str]:
    named = (re.findall(r"^\+\+\+ b/(\S+)", diff.read_text(), re.MULTILINE) for diff in diffs)
    return {name for names in named for name in names}


def _files_of(seams: Sequence[Seam], diffs: Sequence[Path]) -> set[str]:
    return {seam.module.replace(".", "/") + ".py" for seam in seams} | _files_named_in(diffs)


def _copy_files(source: Path, names: Sequence[str], folder: Path) -> None:
    """Copy the files that exist. A missing one shows as a broken seam or a diff that does not apply."""
    for name in names:
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _check_patched_file(path: Path) -> list[str]:
    """Check that the file compiles and that what it imports of ours exists."""
    if not path.is_file():
        return ["does not exist"]
    source = path.read_text(encoding="utf-8")
    try:
        compile(source, str(path), "exec")
    except SyntaxError as error:
        return [f"does not compile: {error}"]
    imports = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PATCH_MARK}.")
    ]
    return [
        f"imports {alias.name} from {node.module}, which has no such name"
        for node in imports
        for alias in node.names
        if not hasattr(importlib.import_module(node.module or ""), alias.name)
    ]
