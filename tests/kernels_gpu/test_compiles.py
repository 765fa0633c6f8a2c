"""Every Triton kernel compiles for the GPUs that are supported, fits them and spills next to nothing."""

import os
import subprocess
import sys

import pytest

from tests.kernels_gpu.compile_ahead import ARCHITECTURES


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        (80, "few"),
        (90, "fewer heads"),
        (100, "few"),
        *(pytest.param(each, "all", marks=pytest.mark.endurance) for each in ARCHITECTURES),
    ],
)
def test_kernels_compile_and_fit(architecture: int, shapes: str):
    # In a process of its own: here Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kernels_gpu.compile_ahead",
            "--architecture",
            str(architecture),
            "--shapes",
            shapes,
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in (
        "_mean_queries",
        "score_tile",
        "_soft_vote",
        "vote_tile",
        "_rotate_queries",
        "_gather",
        "_count_exponents",
        "_count_mantissas",
        "_write_table",
        "_write_finished",
        "attend_split",
    ):
        assert kernel in done.stdout
