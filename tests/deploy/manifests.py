"""The Kubernetes objects that kustomize makes of `deploy/kubernetes`, and parts of them."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.deploy.tools import REPOSITORY, run

ROOT = REPOSITORY / "deploy/kubernetes"
Manifest = dict[str, Any]

# What a user applies: a folder, and the optional components that its file offers.
VARIANTS = {
    "cpu": ("overlays/cpu", []),
    "cpu, monitored": ("overlays/cpu", ["monitoring"]),
    "gpu": ("overlays/gpu", []),
    "gpu, monitored": ("overlays/gpu", ["monitoring"]),
    "gpu, autoscaled": ("overlays/gpu", ["monitoring", "autoscaling"]),
    "gpu-tp": ("overlays/gpu-tp", []),
    "gpu-tp, autoscaled": ("overlays/gpu-tp", ["monitoring", "autoscaling"]),
    "kuberay": ("kuberay", []),
    "kuberay, monitored": ("kuberay", ["monitoring"]),
}


@cache
def build(variant: str) -> tuple[Manifest, ...]:
    """Every object of one of the VARIANTS."""
    folder, components = VARIANTS[variant]
    with TemporaryDirectory() as work:
        # kustomize takes folders of other trees by a relative path only.
        above = Path(os.path.relpath(ROOT, Path(work).resolve()))
        kustomization = {
            "resources": [str(above / folder)],
            "components": [str(above / "components" / component) for component in components],
        }
        Path(work, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return tuple(yaml.safe_load_all(run("kubectl", "kustomize", work)))


def objects(variant: str, kind: str) -> list[Manifest]:
    """The objects of one kind."""
    return [manifest for manifest in build(variant) if manifest["kind"] == kind]


def pod_templates(variant: str) -> list[Manifest]:
    """Pod templates of a variant; the first one is that of the server."""
    templates = [deployment["spec"]["template"] for deployment in objects(variant, "Deployment")]
    for cluster in objects(variant, "RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        templates += [group["template"] for group in groups]
    return templates


def server(variant: str) -> Manifest:
    """The container that runs `vllm serve`."""
    [container] = pod_templates(variant)[0]["spec"]["containers"]
    return container


def config_map(variant: str) -> dict[str, str]:
    """Files of the ConfigMap that the server's pod mounts."""
    volumes = pod_templates(variant)[0]["spec"]["volumes"]
    [name] = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
    [found] = [m for m in objects(variant, "ConfigMap") if m["metadata"]["name"] == name]
    return found["data"]


def serve_settings(variant: str) -> dict[str, Any]:
    """The file that `vllm serve --config` reads."""
    return yaml.safe_load(config_map(variant)["vllm.yaml"])
