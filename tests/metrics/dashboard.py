"""The Grafana dashboard, as tests read it."""

from __future__ import annotations

import json

from tests.metrics.alarms import REPOSITORY

DASHBOARD = json.loads((REPOSITORY / "deploy/grafana/tokenselect.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
