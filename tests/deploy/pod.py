"""Run an image with runc as Kubernetes would run the pod of a manifest, and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.deploy.dockerfile import environment, values
from tests.deploy.manifests import Manifest, config_map, pod_templates, server
from tests.deploy.tools import REPOSITORY
from vllm_tokenselect.tools.common.watcher import watch_group

UNITS = {"Mi": 2**20, "Gi": 2**30}


class Pod:
    """The only container of a variant's pod.

    Args:
        variant: of `manifests.VARIANTS`.
        image: the Dockerfile's stage that the image was built from.
        root: the image's files.
        folder: an empty folder for the pod's volumes and log.
        secrets: values of the Secrets that the manifest names, by their keys.
    """

    def __init__(
        self, variant: str, image: str, root: Path, folder: Path, secrets: dict[str, str]
    ) -> None:
        self.id = f"image-check-{os.getpid()}"
        self.folder = folder
        self._container = server(variant)
        self._spec = pod_templates(variant)[0]["spec"]
        self._variables = environment(image) | {
            variable["name"]: _value(variable, secrets) for variable in self._container["env"]
        }
        # A limit of more CPUs than there are here would make more threads than cores.
        cores = len(os.sched_getaffinity(0))
        threads = min(int(self._variables["OMP_NUM_THREADS"]), cores)
        self._variables["OMP_NUM_THREADS"] = str(threads)
        self._volumes = {volume["name"]: volume for volume in self._spec["volumes"]}
        self._config = config_map(variant)
        (folder / "config.json").write_text(json.dumps(self._runc(image, root), indent=1))

    def start(self) -> None:
        """Start the container; its output goes to `log`."""
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["runc", "run", "--bundle", self.folder, self.id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watcher = watch_group(self._process.pid)

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for the status that the readiness probe waits for."""
        path = self._container["readinessProbe"]["httpGet"]["path"]
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._is_created() and self.ask("status", "GET", path).stdout.strip() == "200":
                return
            time.sleep(1)
        raise AssertionError(f"not ready within {seconds:.0f} s: {self.log()[-6000:]}")

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `tests.deploy.client` in the pod's network, to its end."""
        return subprocess.run(
            self._asking(arguments), cwd=REPOSITORY, capture_output=True, text=True
        )

    def start_asking(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `tests.deploy.client` in the pod's network."""
        return subprocess.Popen(
            self._asking(arguments), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )

    def terminate(self) -> None:
        """What Kubernetes sends first to a pod that is to end."""
        subprocess.run(["runc", "kill", self.id, "TERM"], check=True)

    def wait(self) -> int:
        """The exit status, within the time that the manifest leaves."""
        return self._process.wait(self._spec["terminationGracePeriodSeconds"])

    def stop(self) -> None:
        """Leave nothing running, and nothing of the container behind."""
        subprocess.run(["runc", "kill", self.id, "KILL"], capture_output=True)
        self._process.wait(60)
        subprocess.run(["runc", "delete", "--force", self.id], capture_output=True)
        self._watcher.dismiss()

    def log(self) -> str:
        """Everything that the container wrote."""
        return (self.folder / "log").read_text(errors="replace")

    def volume(self, name: str) -> Path:
        """The folder of an empty volume."""
        return self.folder / "volumes" / name

    def _is_created(self) -> bool:
        return subprocess.run(["runc", "state", self.id], capture_output=True).returncode == 0

    def _asking(self, arguments: Sequence[str]) -> list[str]:
        state = json.loads(subprocess.check_output(["runc", "state", self.id]))
        network = ["nsenter", f"--net=/proc/{state['pid']}/ns/net"]
        key = self._variables["VLLM_API_KEY"]
        return [*network, sys.executable, "-m", "tests.deploy.client", key, *arguments]

    def _runc(self, image: str, root: Path) -> dict[str, Any]:
        """The container as runc reads it."""
        rights, user = self._container["securityContext"], self._spec["securityContext"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        variables = {"PATH": path, "HOME": values(image, "WORKDIR")[0]} | self._variables
        limit = self._container["resources"]["limits"]["memory"]
        names = ("cgroup", "ipc", "mount", "network", "pid", "uts")
        return {
            "ociVersion": "1.0.2",
            "hostname": self.id,
            "root": {"path": str(root), "readonly": rights["readOnlyRootFilesystem"]},
            "process": {
                "user": {
                    "uid": user["runAsUser"],
                    "gid": user["runAsGroup"],
                    "additionalGids": [user["fsGroup"]],
                },
                "args": [*json.loads(values(image, "ENTRYPOINT")[0]), *self._container["args"]],
                "env": [f"{name}={value}" for name, value in variables.items()],
                "cwd": values(image, "WORKDIR")[0],
                "capabilities": {},
                "noNewPrivileges": not rights["allowPrivilegeEscalation"],
            },
            "mounts": [*SYSTEM, *map(self._mount, self._container["volumeMounts"])],
            "linux": {
                "namespaces": [{"type": name} for name in names],
                "resources": {
                    "memory": {"limit": int(limit[:-2]) * UNITS[limit[-2:]]},
                    "devices": [{"allow": False, "access": "rwm"}],
                },
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/sysrq-trigger"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            },
        }

    def _mount(self, mount: Manifest) -> dict[str, Any]:
        """A mount of the container, and the volume behind it."""
        volume = self._volumes[mount["name"]]
        target = mount["mountPath"]
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            size = volume["emptyDir"]["sizeLimit"].replace("Gi", "g")
            options = ["nosuid", "nodev", "mode=1777", f"size={size}"]
            return {"destination": target, "type": "tmpfs", "source": "shm", "options": options}
        source = self.volume(mount["name"])
        source.mkdir(parents=True)
        source.chmod(0o777)  # as an emptyDir is
        if "configMap" in volume:
            for name, text in self._config.items():
                (source / name).write_text(text)
        options = ["bind", "nosuid", "nodev", "ro" if mount.get("readOnly") else "rw"]
        return {"destination": target, "type": "bind", "source": str(source), "options": options}


SYSTEM = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
    },
    {
        "destination": "/sys",
        "type": "sysfs",
        "source": "sysfs",
        "options": ["nosuid", "noexec", "nodev", "ro"],
    },
]


def _value(variable: Manifest, secrets: dict[str, str]) -> str:
    if "value" in variable:
        return variable["value"]
    return secrets[variable["valueFrom"]["secretKeyRef"]["key"]]
