"""What a cluster accepts, by schemas of Kubernetes and the operators, and by Pod Security "restricted"."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.deploy.manifests import Manifest, templates_of

# Schemas of each kind that an operator brings: of KubeRay the oldest release that works and the newest
# that is known.
OPERATORS = {
    "PodMonitor": ["podmonitor"],
    "PrometheusRule": ["prometheusrule"],
    "RayCluster": ["raycluster-1.6.2", "raycluster-1.7.0"],
}
# What the level "restricted" of Kubernetes' Pod Security Standards lets a pod mount.
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}


def check(manifests: tuple[Manifest, ...], version: str) -> None:
    """Look at objects and pods as a cluster of this version would that knows every field.

    Raises:
        Exception: of the library that found what is wrong.
    """
    for manifest in manifests:
        if schemas := OPERATORS.get(manifest["kind"]):
            for schema in schemas:
                jsonschema.validate(manifest, strict_schema(schema))
        else:
            kubernetes_validate.validate(manifest, version, strict=True)
    for template in templates_of(manifests):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template}
        kubernetes_validate.validate(pod, version, strict=True)


@cache
def strict_schema(name: str) -> dict[str, Any]:
    """A schema in which a field that is not known is an error, as in `kubectl apply --validate=strict`."""
    text = Path(__file__).parent.joinpath("schemas", f"{name}.json").read_text()
    schema: dict[str, Any] = closed(json.loads(text))
    # An API server knows these itself.
    schema["required"] = [*schema.get("required", []), "apiVersion", "kind", "metadata"]
    return schema


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(pattern := schema.get("pattern"), str):
        # Go, for which it is written, takes the flag anywhere, Python at the beginning alone.
        result["pattern"] = pattern.replace("^(?i)", "(?i)^")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def check_restricted(template: Manifest) -> None:
    """Refuse a pod that "restricted" would, or whose root file system can be written to.

    Raises:
        AssertionError: where it has a right that it does not need.
    """
    pod = template["spec"]
    assert not {"hostIPC", "hostNetwork", "hostPID", "hostUsers", "initContainers"} & set(pod)
    volumes = [kind for v in pod["volumes"] for kind in v.keys() - RESTRICTED_VOLUMES - {"name"}]
    assert not volumes, volumes
    assert set(pod["securityContext"]) == {
        *("runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"),
        "seccompProfile",
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert not [port for port in container.get("ports", []) if "hostPort" in port]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
