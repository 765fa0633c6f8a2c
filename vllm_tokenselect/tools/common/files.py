"""Files of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON to a file, whose folder is made if it is missing; do nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
