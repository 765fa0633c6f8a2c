"""The command line starts fast: what a command works with is loaded when the command runs."""

import json
import subprocess
import sys

import pytest

from vllm_tokenselect.tools.cli.required_extras import EXTRA_OF_COMMAND

CODE = """
import json, sys
from vllm_tokenselect.tools.cli.app import app

app(sys.argv[1:], standalone_mode=False)
heavy = {"aiohttp", "matplotlib", "numpy", "scipy", "torch", "transformers", "vllm"}
print(json.dumps(sorted(heavy & sys.modules.keys())))
"""


@pytest.mark.parametrize("command", [None, *EXTRA_OF_COMMAND])
def test_help_loads_nothing_that_a_command_works_with(command):
    arguments = ["--help"] if command is None else [command, "--help"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True
    )
    assert "Usage:" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []
