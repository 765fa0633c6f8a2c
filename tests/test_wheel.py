"""The wheel, installed beside vLLM into an environment of its own, is complete and serves."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

from tests.models.shortened import first_layers
from tests.prometheus import metric
from vllm_tokenselect.tools.common.server import VllmServer

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "vllm_tokenselect"

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Python of a new environment: the wheel, and of this environment all but the package."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, REPOSITORY]
    subprocess.run(wheels, check=True, cwd=folder)
    [wheel] = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    install = [*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, cwd=folder)
    [packages] = venv.glob("lib/python*/site-packages")
    # A path in such a file is searched last, and what is in its own files of this kind is not: so not what
    # makes this package editable.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # What other tests compiled of the same kernels, as an image would bring it.
    compiled = PACKAGE / "kernels" / "__pycache__"
    if compiled.is_dir():
        beside = packages / "vllm_tokenselect/kernels/__pycache__"
        shutil.copytree(compiled, beside, dirs_exist_ok=True)
    return python


def ask(python: Path, code: str) -> list:
    """What `code` prints as JSON, outside of the repository."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(
        [python, "-c", f"import json\n{code}"],
        cwd=python.parent,
        env=variables,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(told.stdout)


def test_the_wheel_has_every_file_of_the_package(python):
    [path] = ask(python, "import vllm_tokenselect as p\nprint(json.dumps(p.__path__))")
    installed = Path(path)
    assert installed.is_relative_to(python.parents[1])
    files = {
        file.relative_to(PACKAGE)
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {Path("py.typed"), Path("plugin.py")} <= files
    assert [str(file) for file in files if not (installed / file).is_file()] == []


def test_vllm_finds_the_plugin_of_the_wheel_once(python):
    found = ask(
        python,
        "from importlib.metadata import entry_points\n"
        "found = entry_points(group='vllm.general_plugins', name='tokenselect')\n"
        "print(json.dumps([str(one.dist.locate_file('')) for one in found]))",
    )
    assert [Path(folder).is_relative_to(python.parents[1]) for folder in found] == [True]


def test_the_installed_wheel_serves(python, smollm2, tmp_path, monkeypatch):
    model = first_layers(smollm2, tmp_path / "model", 1)
    settings = {"top_k": 256, "n_init": 32, "n_local": 128, "query_chunk": 256}
    server = VllmServer(model, settings=settings, log_path=tmp_path / "server.log")
    server.command[0] = str(python)
    server.env.pop("PYTHONPATH", None)
    monkeypatch.chdir(tmp_path)
    with server:
        asked = {"model": str(model), "prompt": list(range(1000, 2000)), "max_tokens": 4}
        request = urllib.request.Request(
            f"{server.base_url}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        rows = 0.0
        deadline = time.monotonic() + 20  # workers publish about once a second
        while not rows and time.monotonic() < deadline:
            time.sleep(0.5)
            with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=60) as answer:
                rows = metric(answer.read().decode(), "vllm:tokenselect_rows_total")
        assert rows > 0
