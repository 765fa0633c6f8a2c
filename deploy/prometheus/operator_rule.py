"""Write the alarms for the Prometheus operator: `make alarms`.

A PrometheusRule holds the groups of a rules file. kustomize cannot put a file in there, so this copies it.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

RULES = Path(__file__).with_name("tokenselect.rules.yaml")
OPERATOR_RULE = Path(__file__).parents[1] / "kubernetes/components/monitoring/prometheusrule.yaml"
HEAD = """\
# Written by `make alarms` from deploy/prometheus/tokenselect.rules.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vllm-tokenselect
spec:
"""


def operator_rule(rules: str) -> str:
    """The PrometheusRule with the groups of a rules file."""
    groups = rules[rules.index("groups:") :]
    return HEAD + indent(groups, "  ")


if __name__ == "__main__":
    OPERATOR_RULE.write_text(operator_rule(RULES.read_text(encoding="utf-8")), encoding="utf-8")
