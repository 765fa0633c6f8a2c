"""What of KubeRay's RayCluster is used here, as a JSON schema.

Written from KubeRay's reference of `ray.io/v1` for 1.7
(https://docs.ray.io/en/latest/cluster/kubernetes/references.html), narrower than it: a field that is
not here is an error, so that a misspelt one is found. Pod templates are checked as Kubernetes' own.
"""

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}


def _closed(required: list[str], **properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


RAY_CLUSTER = _closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=_closed(["name"], name={"type": "string"}),
    spec=_closed(
        ["headGroupSpec"],
        rayVersion={"type": "string"},
        authOptions=_closed([], mode={"enum": ["disabled", "token"]}),
        headGroupSpec=_closed(
            ["rayStartParams", "template"],
            # A Service of Kubernetes; KubeRay adds its name, selector and ports.
            headService=_closed(
                [],
                spec=_closed(
                    [],
                    clusterIP={"const": "None"},
                    publishNotReadyAddresses={"type": "boolean"},
                ),
            ),
            rayStartParams=_TEXTS,
            template={"type": "object"},
        ),
        workerGroupSpecs={
            "type": "array",
            "items": _closed(
                ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                groupName={"type": "string"},
                replicas=_COUNT,
                minReplicas=_COUNT,
                maxReplicas=_COUNT,
                rayStartParams=_TEXTS,
                template={"type": "object"},
            ),
        },
    ),
)
