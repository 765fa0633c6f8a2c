"""A run of tests that the machine cannot hold ends with one line, before anything is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def run_tests(tmp_path):
    """Run pytest on a machine with 6 GiB of free memory."""
    (tmp_path / "sitecustomize.py").write_text(
        "import psutil\n"
        "real = psutil.virtual_memory\n"
        "psutil.virtual_memory = lambda: real()._replace(available=6 * 2**30)\n"
    )

    def run(*arguments: str) -> tuple[int, list[str]]:
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
            capture_output=True,
            text=True,
            check=False,
        )
        return process.returncode, (process.stdout + process.stderr).strip().splitlines()

    return run


def test_too_little_memory_for_the_servers_is_said_in_one_line(run_tests):
    status, [line] = run_tests("-n", "2", "tests/server", "tests/tools/common/test_server.py")
    assert status == 2
    assert "need 10 GiB of free memory, for 2 server(s) at a time; 6.0 GiB are free" in line
    assert "make test JOBS=1" in line


def test_what_starts_no_server_needs_no_memory_for_servers(run_tests):
    asked = ("-m", "not server", "tests/tools/common/test_timing.py", "tests/server/test_start.py")
    assert run_tests(*asked)[0] == 0
