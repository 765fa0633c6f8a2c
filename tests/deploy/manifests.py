"""The Kubernetes objects that kustomize makes of `deploy/kubernetes`, and parts of them."""

import os
import re
from functools import cache
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.deploy.tools import REPOSITORY, run

ROOT = REPOSITORY / "deploy/kubernetes"
Manifest = dict[str, Any]
# `# key:`, `# key: value`, `#   - key: value` and `# - ../../components/monitoring`; no sentence looks so.
OFFERED = re.compile(r"^( *)# ( *(?:(?:- )?[\w./]+:(?: \S+)?|- \.\./\S+))$", re.MULTILINE)

# What a user applies: a folder, and the optional components that its file offers.
VARIANTS = {
    "cpu": ("overlays/cpu", ()),
    "cpu, monitored": ("overlays/cpu", ("monitoring",)),
    "gpu": ("overlays/gpu", ()),
    "gpu, monitored": ("overlays/gpu", ("monitoring",)),
    "gpu, autoscaled": ("overlays/gpu", ("monitoring", "autoscaling")),
    "gpu-tp": ("overlays/gpu-tp", ()),
    "gpu-tp, monitored": ("overlays/gpu-tp", ("monitoring",)),
    "gpu-tp, autoscaled": ("overlays/gpu-tp", ("monitoring", "autoscaling")),
    "kuberay": ("kuberay", ()),
    "kuberay, monitored": ("kuberay", ("monitoring",)),
}


def build(variant: str, name_suffix: str = "") -> tuple[Manifest, ...]:
    """Every object of one of the VARIANTS, with what a user's own kustomization puts behind all names."""
    return combine(*VARIANTS[variant], name_suffix)


@cache
def combine(
    folder: str, components: tuple[str, ...], name_suffix: str = ""
) -> tuple[Manifest, ...]:
    """Every object of a folder with components of `components/`, in this order."""
    with TemporaryDirectory() as work:
        # kustomize takes folders of other trees by a relative path only.
        above = Path(os.path.relpath(ROOT, Path(work).resolve()))
        kustomization = {
            "resources": [str(above / folder)],
            "components": [str(above / "components" / component) for component in components],
            "nameSuffix": name_suffix,
        }
        Path(work, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(work)


def kustomize(folder: str | Path) -> tuple[Manifest, ...]:
    """Every object that kustomize makes of a folder."""
    return tuple(yaml.safe_load_all(run("kubectl", "kustomize", folder)))


def combinations() -> list[tuple[str, tuple[str, ...]]]:
    """Each folder that is applied with all that it offers, in any number and order."""
    found = []
    for folder in dict.fromkeys(folder for folder, _ in VARIANTS.values()):
        text = (ROOT / folder / "kustomization.yaml").read_text()
        offered = re.findall(r"^ *#  *- (?:\.\./)+components/(\w+)$", text, re.MULTILINE)
        for number in range(len(offered) + 1):
            found += [(folder, chosen) for chosen in permutations(offered, number)]
    return found


def uncomment(folder: Path) -> None:
    """Take the `#` off every line of YAML below a folder that is offered as a comment."""
    for path in folder.rglob("*.yaml"):
        path.write_text(OFFERED.sub(r"\1\2", path.read_text()))


def objects(variant: str, kind: str, name_suffix: str = "") -> list[Manifest]:
    """The objects of one kind."""
    return [manifest for manifest in build(variant, name_suffix) if manifest["kind"] == kind]


def pod_templates(variant: str, name_suffix: str = "") -> list[Manifest]:
    """Pod templates of a variant; the first one is that of the server."""
    return templates_of(build(variant, name_suffix))


def templates_of(manifests: tuple[Manifest, ...]) -> list[Manifest]:
    """Pod templates of Deployments and RayClusters, with the labels that KubeRay adds."""
    templates = []
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            templates.append(manifest["spec"]["template"])
        elif manifest["kind"] == "RayCluster":
            groups = [manifest["spec"]["headGroupSpec"], *manifest["spec"]["workerGroupSpecs"]]
            for group, node_type in zip(groups, ("head", "worker"), strict=True):
                template = group["template"]
                metadata = template.get("metadata", {})
                added = {
                    "ray.io/cluster": manifest["metadata"]["name"],
                    "ray.io/node-type": node_type,
                }
                labels = {**metadata.get("labels", {}), **added}
                templates.append({**template, "metadata": {**metadata, "labels": labels}})
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
