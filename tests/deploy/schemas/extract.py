"""Write a CustomResourceDefinition's schema of one version as small JSON, without descriptions.

`python -m tests.deploy.schemas.extract v1 < CRD.yaml > schema.json`

Pod templates are left out: they are checked as Kubernetes' own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml


def without_descriptions(schema: Any) -> Any:
    """The schema without what explains it; a field that is called `description` stays."""
    if isinstance(schema, list):
        return [without_descriptions(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: without_descriptions(field) for name, field in value.items()}
            if "template" in kept[key]:
                kept[key]["template"] = {"type": "object", "additionalProperties": True}
        elif key != "description":
            kept[key] = without_descriptions(value)
    return kept


def main(version: str) -> None:
    definition = yaml.safe_load(sys.stdin)
    [found] = [v for v in definition["spec"]["versions"] if v["name"] == version]
    schema = without_descriptions(found["schema"]["openAPIV3Schema"])
    json.dump(schema, sys.stdout, separators=(",", ":"), sort_keys=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
