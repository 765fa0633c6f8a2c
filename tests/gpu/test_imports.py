"""The GPU path needs torch, Triton and numpy: it runs where no server is installed."""

import subprocess
import sys

ABSENT = ("vllm", "numba", "pydantic", "transformers", "xformers", "rich", "typer")


def test_kernels_and_steps_import_without_anything_else():
    code = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
import vllm_tokenselect.kernels
from vllm_tokenselect.kernels.block_table import gpu
from vllm_tokenselect.gpu import attention, flash_attention, rows, step, warmup, workspace
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
