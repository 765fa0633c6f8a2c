"""torchvision on a machine where only its build for GPUs can be had.

Its Python is all that vLLM and processors of images need. Its compiled part does not load beside torch's
CPU build; so those of its operations that it takes for granted are declared.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints" / "cpu.txt"
DECLARED = """
_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def unpack_torchvision(folder: Path) -> list[str]:
    """Folders for the path of a Python that imports torchvision: none if this one does."""
    if importlib.util.find_spec("torchvision"):
        return []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--constraint", str(CONSTRAINTS), "--dest", str(folder)]
    subprocess.run([*pip, *options, "torchvision"], check=True)
    (wheel,) = folder.glob("torchvision-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [f for f in archive.namelist() if not f.endswith(".so")])
    with (folder / "torchvision" / "extension.py").open("a") as extension:
        extension.write(DECLARED)
    return [str(folder)]
