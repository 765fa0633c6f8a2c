"""A server that has started compiles nothing more."""

import os
import subprocess
import sys


def test_no_step_needs_a_kernel_that_was_not_compiled_at_start():
    # In a process of its own: here Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiled_steps"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
