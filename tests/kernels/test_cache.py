"""Compiled kernels are kept where there is room for them, and only as long as their sources stay."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import vllm_tokenselect
from vllm_tokenselect.kernels.cpu_cache import _can_be_written, is_temporary

WRITE_A_TOKEN = """
import tempfile, torch
from vllm_tokenselect.kernels import cpu_cache
from vllm_tokenselect.kernels.write.cpu import _write, write_tokens
tokens, kv_cache = torch.ones(1, 1, 32), torch.zeros(1, 1, 2, 16, 32)
write_tokens(tokens, tokens, kv_cache, torch.zeros(1, dtype=torch.int64))
assert kv_cache.sum() == 64
print(cpu_cache.kept_in(), sum(_write.stats.cache_hits.values()))
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """The folder of a copy of the package that cannot be written to, not even by root."""
    copy = tmp_path / "read-only" / "vllm_tokenselect"
    copytree(Path(vllm_tokenselect.__file__).parent, copy, ignore=ignore_patterns("__pycache__"))
    (copy / "kernels" / "__pycache__").write_text("a file, where a folder would be made")
    return copy


def run(package: Path, program: str = WRITE_A_TOKEN, **environment: str) -> tuple[str, int]:
    """Where a new process without a home folder keeps kernels, and how many it found there."""
    names = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, "HOME": "/dev/null", "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=package.parent,
    )
    assert done.returncode == 0, done.stderr
    folder, hits = done.stdout.split()
    return folder, int(hits)


def test_without_a_home_folder_kernels_are_kept_in_a_temporary_one_of_the_users_own(
    package, tmp_path
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    folder, hits = run(package, TMPDIR=str(temporary))
    assert hits == 0
    assert Path(folder).parent == temporary
    assert is_temporary(Path(folder))
    assert Path(folder).stat().st_mode & 0o077 == 0
    assert run(package, TMPDIR=str(temporary)) == (folder, 1)


def test_without_any_folder_kernels_are_compiled_and_run(package):
    nowhere = "import tempfile; tempfile.tempdir = '/dev/null';"
    assert run(package, nowhere + WRITE_A_TOKEN) == ("None", 0)


def test_a_temporary_folder_that_others_can_write_to_is_not_used(tmp_path):
    folder = tmp_path / f"vllm-tokenselect-kernels-{os.getuid()}"
    assert _can_be_written(folder)
    folder.chmod(0o777)
    assert not _can_be_written(folder)
    target = tmp_path / "target"
    folder.rename(target)
    target.chmod(0o700)
    folder.symlink_to(target)
    assert not _can_be_written(folder), "somebody else may have made the link"


def test_a_kernel_is_compiled_again_after_a_change_of_what_it_calls(package, tmp_path):
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    assert run(package, **kept) == (str(tmp_path / "kept" / "vllm_tokenselect"), 0)
    assert run(package, **kept)[1] == 1
    for source in ("kernels/cpu_numbers.py", "cpu/step.py", "counters.py"):
        called = package / source
        called.write_text(called.read_text() + "\n")
        assert run(package, **kept)[1] == 0, source
