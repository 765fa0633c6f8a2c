"""The real model that the tests serve, and Triton's interpreter where there is no GPU."""

import os

# Two test processes and their servers share two cores. A thread that waits for another gives its core
# away, where OpenMP would have it spin. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which may be by any of the tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2

# A hundred thousand steps of each state machine: `make endurance`.
settings.register_profile("endurance", max_examples=1000, stateful_step_count=100)


# A server of the tests and the process that asks it, at their largest.
GIB_OF_A_JOB = 5


def pytest_configure(config: pytest.Config) -> None:
    """Say at once how much memory the tests need, rather than let servers be killed one after the other."""
    if hasattr(config, "workerinput") or not has_servers(config):
        return
    jobs = config.getoption("numprocesses", None) or 1
    available = psutil.virtual_memory().available / 2**30
    if available < jobs * GIB_OF_A_JOB:
        pytest.exit(
            f"These tests need {jobs * GIB_OF_A_JOB} GiB of free memory, for {jobs} server(s) at a time; "
            f"{available:.1f} GiB are free. End what takes it, or run fewer at a time "
            "(make test JOBS=1) or none (make test ARGS=\"-m 'not server and not endurance'\").",
            returncode=2,
        )


def has_servers(config: pytest.Config) -> bool:
    """Whether any of the files that were asked for starts servers."""
    if "not server" in config.getoption("markexpr") or config.getoption("collectonly"):
        return False
    asked = [Path(argument.split("::")[0]) for argument in config.args]
    files = [file for path in asked for file in ([path] if path.is_file() else path.rglob("*.py"))]
    return any("mark.server" in file.read_text(encoding="utf-8") for file in files)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers first: the longest files must not be what is left for one of two processes at the end."""
    items.sort(key=lambda item: item.get_closest_marker("server") is None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted once into the cache."""
    return ensure_smollm2(progress=False)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)
