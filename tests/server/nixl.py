"""NIXL for the servers of the tests. It is no dependency: its wheels are large, and few need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Both that vLLM imports and what it wraps. The first alone would bring builds for CUDA 12 and 13.
RELEASES = ("nixl==1.5.1", "nixl-cu12==1.5.1")


def downloaded() -> Path:
    """A folder with NIXL, to be put on a server's PYTHONPATH; downloaded once."""
    folder = Path(__file__).parents[2] / "build" / "-".join(RELEASES).replace("==", "-")
    if not (folder / "nixl" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *RELEASES], check=True)
    return folder
