"""What the kernels compute depends on their inputs alone, to the last bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def hashes(folder: Path, **environment: str) -> list[str]:
    """Of a new process's outputs, which keeps its kernels in the folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.hashes"],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder), "NUMBA_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def cold(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("kernels")
    return folder, hashes(folder)


def test_kernels_out_of_the_cache_give_the_same_bits_as_when_they_were_compiled(cold):
    folder, compiled = cold
    kept = sorted(folder.rglob("*.nbc"))
    assert len(compiled) > 20
    assert hashes(folder) == compiled
    assert kept == sorted(folder.rglob("*.nbc")) != [], "nothing was compiled the second time"


def test_the_number_of_threads_changes_no_bit(cold):
    folder, compiled = cold
    assert hashes(folder, NUMBA_NUM_THREADS="2") == compiled


def test_how_far_the_compiler_optimizes_changes_no_bit(cold, tmp_path):
    """As it may differ between processors, releases of LLVM, and copies of one function."""
    _, compiled = cold
    assert hashes(tmp_path, NUMBA_OPT="1", NUMBA_LOOP_VECTORIZE="0") == compiled
