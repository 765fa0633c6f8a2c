"""Start what can be started of a vLLM release that is not installed: on a CPU, and as if on a GPU.

A copy of the release's Python source gets stand-ins for what is compiled. For a GPU one of them is NVML,
which reports a single H200, so that vLLM finds its CUDA platform by itself. `rehearsal` then runs beside
that copy. It imports every module of ours that knows vLLM, makes an engine's configuration, lets vLLM
choose the backend and installs every hook. `test_beside` runs the project's own tests beside a copy for
CPUs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from vllm_tokenselect.hooks.check import REPOSITORY

Machine = Literal["cpu", "cuda"]
MACHINES: tuple[Machine, ...] = ("cuda", "cpu")

_NVML = "vllm/third_party/pynvml.py"
_TIMEOUT = 600.0


def stage(source: Path, version: str, machine: Machine, folder: Path) -> Mapping[str, str]:
    """Put a copy of a release into `folder`, as it would be installed on a machine.

    Its compiled operations for CPUs are those of the installed vLLM, if that is one for CPUs. Otherwise an
    empty module stands in.

    Args:
        source: folder that holds the `vllm` package.
        version: of the release, such as `0.33.0`.

    Returns:
        environment variables with which a Python process imports that copy.
    """
    shutil.copytree(
        source / "vllm",
        folder / "vllm",
        copy_function=lambda path, copy: Path(copy).symlink_to(Path(path).resolve()),
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    here = Path(__file__).parent
    if machine == "cuda":
        (folder / _NVML).unlink()
        shutil.copyfile(here / "stand_in_nvml.py", folder / _NVML)
    else:
        version += "+cpu"
        for library in _compiled_for_cpus():
            (folder / "vllm" / library.name).symlink_to(library)
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    shutil.copyfile(here / "stand_ins.py", folder / "sitecustomize.py")
    environment = {
        "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if machine == "cuda":
        # Ray sets this, too: vLLM then expects no driver yet.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def rehearse(source: Path, version: str, machine: Machine, folder: Path) -> list[str]:
    """What keeps the release from starting with the plugin, in words; empty if it would start.

    Args:
        source: folder that holds the `vllm` package.
        version: of the release.
        folder: for the copy; made here.
    """
    environment = {**os.environ, **stage(source, version, machine, folder)}
    command = [sys.executable, "-m", "vllm_tokenselect.hooks.check.rehearsal", machine]
    result = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    problems = [
        line.removeprefix("problem: ")
        for line in result.stdout.splitlines()
        if line.startswith("problem: ")
    ]
    if result.returncode and not problems:
        problems = [(result.stderr or result.stdout).strip()[-1500:]]
    return [f"on {machine}: {problem}" for problem in problems]


def test_beside(source: Path, version: str, folder: Path, paths: Sequence[str]) -> list[str]:
    """Run tests of the project on CPUs with the release in the place of the vLLM that is installed.

    Args:
        source: folder that holds the `vllm` package.
        version: of the release.
        folder: for the copy; made here.
        paths: tests, below the project's folder.

    Returns:
        one sentence if any failed; pytest has printed which.
    """
    environment = {**os.environ, **stage(source, version, "cpu", folder)}
    command = [sys.executable, "-m", "pytest", "-q", *paths]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, check=False)
    return [f"tests fail beside it: {' '.join(command[2:])}"] if result.returncode else []


def _compiled_for_cpus() -> list[Path]:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return []
    installed = Path(spec.submodule_search_locations[0])
    if not list(installed.glob("_C.*so")):  # the build for GPUs has another name for it
        return []
    return sorted(path.resolve() for path in installed.glob("*.so"))
