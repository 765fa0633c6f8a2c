"""What our code imports in vLLM's processes: nothing that draws, asks servers or counts statistics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

# Notes who imports what: the nearest module up the stack that is vLLM's, numba's or ours. vLLM loads some
# of these packages itself when our code imports its modules, and numba looks for scipy: those are not ours.
WATCH = """
import builtins, json, sys

UNWANTED = {"aiohttp", "lm_eval", "matplotlib", "pandas", "rich", "scipy", "tenacity", "typer"}
plain_import, found = builtins.__import__, set()

def importer():
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] in ("numba", "vllm", "vllm_tokenselect"):
            return name
        frame = frame.f_back
    return ""

def watched_import(name, *arguments, **options):
    if name.partition(".")[0] in UNWANTED and importer().startswith("vllm_tokenselect"):
        found.add(f"{name} by {importer()}")
    return plain_import(name, *arguments, **options)

import vllm
builtins.__import__ = watched_import
"""
REPORT = """
tools = {name for name in sys.modules if name.startswith("vllm_tokenselect.tools")}
print(json.dumps(sorted(found | tools)))
"""
# Triton is installed on GPUs alone: to take it away is to import it in vain.
PLUGINS = """
sys.modules["triton"] = None
from vllm.plugins import load_general_plugins
load_general_plugins()
assert "vllm_tokenselect.hooks.engine_config" in sys.modules
"""
WORKER = """
import importlib, pkgutil
import vllm_tokenselect
for room in ("backend", "cpu", "engine", "hooks"):
    package = importlib.import_module(f"vllm_tokenselect.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "gpu" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def imported_by_us(code: str, folder: Path = PROJECT) -> list[str]:
    """Unwanted packages that our code imports while a new Python runs `code`, and tools of ours."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code + REPORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", [PLUGINS, WORKER], ids=["plugins", "worker"])
def test_in_a_process_of_vllm_our_code_imports_nothing_of_the_tools(code):
    assert imported_by_us(code) == []


def test_an_import_of_ours_is_seen_and_one_of_vllms_is_not(tmp_path):
    for package, imported in {
        "vllm": "",
        "vllm/server": "import aiohttp",
        "vllm_tokenselect": "import vllm.server, between",
        "vllm_tokenselect/tools": "",
        "between": "import scipy",
    }.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(imported)
    code = "import vllm_tokenselect, vllm_tokenselect.tools\nassert 'aiohttp' in sys.modules\n"
    found = imported_by_us(code, tmp_path)
    assert [one for one in found if not one.startswith("scipy.")] == [
        "scipy by vllm_tokenselect",
        "vllm_tokenselect.tools",
    ]
