"""Build the image for CPUs from the Dockerfile as it stands, with buildah and runc.

Where the registry cannot be reached, the image that it starts from is made of Debian's packages.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.deploy.dockerfile import values
from tests.deploy.tools import REPOSITORY

TOOLS = ("buildah", "debootstrap", "nsenter", "runc")
NAME = "localhost/vllm-tokenselect:cpu"
# What Python's own image has beside a minimal Debian.
PACKAGES = ("ca-certificates", "python-is-python3", "python3", "python3-pip")
PULL_SECONDS = 600
# Where packages are found; the other settings are of the user's own pip.
PIP_SETTINGS = ("cert", "constraint", "extra-index-url", "find-links", "index-url", "trusted-host")


@dataclass(frozen=True)
class Built:
    """An image, and how long it took."""

    size: int  # bytes
    base_seconds: float
    build_seconds: float


class Storage:
    """Images of these tests alone, in a folder.

    Args:
        folder: is kept, and with it the image that the Dockerfile starts from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def buildah(self, *arguments: str | Path, seconds: float | None = None) -> str:
        """What buildah prints; where it fails, what it complained about is the error's message."""
        places = ("--root", self.folder / "images", "--runroot", self.folder / "run")
        command = ["buildah", *map(str, (*places, *arguments))]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-6000:]}")
        return done.stdout.strip()

    def build(self) -> Built:
        """Build the stage `cpu`, and what it needs."""
        started = time.monotonic()
        self._ensure_base()
        based = time.monotonic()
        # The format of Docker has health checks, that of OCI has none.
        how = ("--runtime", "runc", "--isolation", "oci", "--network", "host", "--format", "docker")
        volumes = [f"--volume={path}:{path}:ro" for path in self._pip_folders()]
        volumes.append(f"--volume={self._pip_settings()}:/etc/pip.conf:ro")
        # Without the cache: buildah would keep a step whose mounted wheel has changed.
        self.buildah(
            *("build", *how, "--layers", "--no-cache", "--pull-never", *volumes),
            *("--target", "cpu", "--tag", NAME, REPOSITORY),
        )
        self.buildah("rmi", "--prune", "--force")
        built = time.monotonic()
        size = self.buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", NAME)
        return Built(self._size(size), based - started, built - based)

    def mount(self) -> tuple[str, Path]:
        """A container of the image, and the folder that is its root."""
        container = self.buildah("from", "--pull-never", NAME)
        return container, Path(self.buildah("mount", container))

    def remove(self, container: str) -> None:
        """Unmount and forget what `mount` made."""
        self.buildah("rm", container)

    def _size(self, image: str) -> int:
        [line] = [
            line
            for line in self.buildah(
                "images", "--no-trunc", "--format", "{{.ID}} {{.Size}}"
            ).splitlines()
            if image in line
        ]
        number, unit = line.split()[1:]
        return round(float(number) * {"MB": 1e6, "GB": 1e9}[unit])

    def _ensure_base(self) -> None:
        """The image that the Dockerfile starts from: here already, from the registry, or made."""
        [version] = [
            value.split("=")[1] for value in values("", "ARG") if "PYTHON_VERSION" in value
        ]
        base = values("cpu", "FROM")[0].split()[0].replace("${PYTHON_VERSION}", version)
        full = f"docker.io/library/{base}"
        if full in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
            return
        try:
            self.buildah("pull", full, seconds=PULL_SECONDS)
        except (RuntimeError, subprocess.TimeoutExpired):
            self._make_base(full, re.fullmatch(r"python:[\d.]+-slim-(\w+)", base)[1])

    def _make_base(self, name: str, suite: str) -> None:
        container = self.buildah("from", "scratch")
        try:
            root = Path(self.buildah("mount", container))
            made = subprocess.run(
                [
                    "debootstrap",
                    "--variant=minbase",
                    f"--include={','.join(PACKAGES)}",
                    suite,
                    root,
                ],
                capture_output=True,
                text=True,
            )
            assert made.returncode == 0, made.stdout[-4000:] + made.stderr
            for package in (root / "var/cache/apt/archives").glob("*.deb"):
                package.unlink()
            # Python's own image lets pip install beside the system's packages.
            for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
                mark.unlink()
            path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            self.buildah("config", "--env", f"PATH={path}", container)
            self.buildah("commit", container, name)
        finally:
            self.remove(container)

    def _pip_settings(self) -> Path:
        """A file of this machine's pip settings, for the pip that builds the image."""
        lines = [f"{name} = {' '.join(value.split())}" for name, value in pip_settings().items()]
        path = self.folder / "pip.conf"
        path.write_text("\n".join(["[global]", *lines, ""]))
        return path

    def _pip_folders(self) -> list[Path]:
        """Files and folders of this machine that its pip settings name."""
        found = set()
        for word in " ".join(pip_settings().values()).split():
            path = Path(urlsplit(word).path)
            if word.startswith("file:"):
                found.add(path.resolve().parent)  # an index, whose files may stand beside it
            elif word.startswith("/"):
                found.add(path)
        return sorted(path for path in found if path.exists())


def pip_settings() -> dict[str, str]:
    """The settings of pip on this machine that say where packages come from."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for line in sorted(
        listed.splitlines(), reverse=True
    ):  # variables (":env:.") stand last, and win
        name, value = line.split("=", 1)
        name = name.rpartition(".")[2]
        if name in PIP_SETTINGS:
            found[name] = ast.literal_eval(value)
    return found
