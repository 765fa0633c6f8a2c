"""A plugin of pytest's: kernels are compiled for sm_90 and run in the emulator.

    python -m pytest -p tests.emulator.plugin --emulator-seed 3 tests/kernels_gpu

Each test has an order of its own, which the seed and its name decide.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

# Triton reads them when it is imported. A kernel is stored without what a GPU could run.
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_CACHE_DIR"] = str(Path.cwd() / "build" / "emulated-kernels")

import triton

from tests.emulator.driver import ARCHITECTURE, EmulatedGpu, Tally

GPU = EmulatedGpu()
TALLIES = "emulator tallies"  # what a process of pytest-xdist's reports


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulator-seed", default="0", help="decides the order of programs and warps")


def pytest_configure(config: pytest.Config) -> None:
    GPU.install()


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("--emulator-seed")
    return f"emulator: sm_{ARCHITECTURE}, triton {triton.__version__}, --emulator-seed {seed}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    GPU.order = Random(f"{item.config.getoption('--emulator-seed')} {item.nodeid}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[TALLIES] = {
            name: (each.launches, each.programs, each.seconds) for name, each in GPU.tallies.items()
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for name, counts in getattr(node, "workeroutput", {}).get(TALLIES, {}).items():
        here = GPU.tallies[name]
        GPU.tallies[name] = Tally(
            *(
                a + b
                for a, b in zip((here.launches, here.programs, here.seconds), counts, strict=True)
            )
        )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for name, each in sorted(GPU.tallies.items()):
        terminalreporter.write_line(
            f"emulated {name:16} {each.launches:6} launches {each.programs:8} programs "
            f"{each.seconds:7.1f} s"
        )
    terminalreporter.write_line(pytest_report_header(config))


@pytest.fixture(scope="session")
def emulated_gpu() -> EmulatedGpu:
    return GPU
