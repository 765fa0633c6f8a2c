"""The command line starts fast: what a command works with is loaded when the command runs."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.cli.required_extras import EXTRA_OF_COMMAND

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
CODE = """
import json, sys
from vllm_tokenselect.tools.cli.app import app

app(sys.argv[1:], standalone_mode=False)
heavy = {"aiohttp", "matplotlib", "numpy", "scipy", "torch", "transformers", "vllm"}
print(json.dumps(sorted(heavy & sys.modules.keys())))
"""


def test_the_version_is_that_of_the_distribution():
    release = PROJECT["version"]
    assert CliRunner().invoke(app, ["--version"]).output == f"vllm-tokenselect {release}\n"


@pytest.mark.parametrize("command", [None, *EXTRA_OF_COMMAND])
def test_help_loads_nothing_that_a_command_works_with(command):
    arguments = ["--help"] if command is None else [command, "--help"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True
    )
    assert "Usage:" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []
